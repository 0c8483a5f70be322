"""hub.py against a hub on localhost (hub_server.py), with the real huggingface_hub and datasets.

They read the environment when they are imported, so what depends on it runs in processes of its own.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

import hub as hub_module
from infra import data

ROOT = Path(hub_module.__file__).parent
# runs calls [[module, function, args], ...] and prints [result or null, error or null, lines said] for each
CALLS = """
import importlib, json, sys
import hub
hub.TIMEOUT = 1
for module, function, args in json.loads(sys.argv[1]):
    said, result, error = [], None, None
    try:
        result = getattr(importlib.import_module(module), function)(*args, **({"say": said.append} if function == "load_problems" else {}))
        result = result if isinstance(result, str) else list(result)
    except ValueError as caught:
        error = str(caught)
    print(json.dumps([result, error, said]))
"""
MODEL, DATA, FULL_MODEL = (
    "Qwen2.5-Math-7B",
    "agentica-org/DeepScaleR-Preview-Dataset",
    "Qwen/Qwen2.5-Math-7B",
)
BOTH = [["hub", "model_folder", [MODEL]], ["hub", "dataset_rows", [DATA]]]
ROWS = [{"problem": f"{i}+1?", "answer": str(i + 1), "solution": "count"} for i in range(20)]


def start(env, *calls):
    return subprocess.Popen(
        [sys.executable, "-c", CALLS, json.dumps(calls)],
        cwd=ROOT,
        env=os.environ | env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process):
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0 and not err, err
    return [json.loads(line) for line in out.splitlines()]


def ask(env, *calls):
    return finish(start(env, *calls))


def write(folder, **files):
    """Files of a name each; __ stands for the dot, ___ for the slash."""
    for name, content in files.items():
        path = folder / name.replace("___", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def yaml_of(**configs):
    """A README whose header names configurations: config="split: file"."""
    lines = [
        f"- config_name: {name}\n  data_files:\n  - split: {value.split(': ')[0]}\n    path: {value.split(': ')[1]}\n"
        for name, value in configs.items()
    ]
    return "---\nconfigs:\n" + "".join(lines) + "---\n"


@pytest.fixture(scope="module")
def served(hub, tmp_path_factory):
    """The hub with a model in two shards, a data set of one file, and other things that go wrong."""
    make = tmp_path_factory.mktemp
    hub.add(
        "models",
        FULL_MODEL,
        write(
            make("model"),
            config__json={"a": 1},
            tokenizer__json={"b": 2},
            tokenizer__model="m",
            merges__txt="t",
            chat_template__jinja="j",
            model__safetensors__index__json={
                "weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}
            },
            pytorch_model__bin="pickle",
            x__pt="pickle",
            modeling__py="code",
            original___config__json={"c": 3},
            **{"model-1__safetensors": "one", "model-2__safetensors": "two"},
        ),
    )
    hub.add("datasets", DATA, write(make("data"), deepscaler__json=ROWS))
    hub.add(
        "models",
        "Qwen/only-bin",
        write(make("bin"), config__json={"a": 4}, pytorch_model__bin="pickle"),
    )
    hub.add(
        "models",
        "meta-llama/Llama-3.1-8B",
        write(make("gated"), config__json={"a": 5}, model__safetensors="g"),
        gated=True,
    )
    hub.add("datasets", "a/gated", write(make("gated"), a__json=ROWS), gated=True)
    hub.add(
        "datasets", "a/broken", write(make("broken"), a__jsonl='{"problem": "p"}\n{"problem": ')
    )
    hub.add(
        "datasets", "a/script", write(make("script"), script__py="raise SystemExit", a__json=ROWS)
    )
    hub.add("datasets", "a/none", write(make("none"), README__md="nothing else"))
    hub.add(
        "datasets",
        "a/two",
        write(
            make("two"),
            README__md=yaml_of(x="test: x.jsonl", y="train: y.jsonl"),
            x__jsonl='{"problem": "x?", "answer": "1"}',
            y__jsonl='{"problem": "y?", "answer": "2"}',
        ),
    )
    hub.add(
        "datasets",
        "a/solo",
        write(
            make("solo"),
            README__md=yaml_of(main="train: y.jsonl"),
            y__jsonl='{"problem": "y?", "answer": "2"}',
        ),
    )
    return hub


@pytest.fixture(scope="module")
def home(served, tmp_path_factory):
    """HF_HOME after three processes, at the same time, have asked for a model and a data set; with what each of them got."""
    home = tmp_path_factory.mktemp("home") / "hf"
    served.requests.clear()
    served.delays = {"model-2.safetensors": 1.0, "deepscaler.json": 1.0}
    results = [finish(process) for process in [start(served.env(home), *BOTH) for _ in range(3)]]
    served.delays = {}
    return home, results, list(served.requests), served.downloads()


@pytest.fixture(scope="module")
def closed():
    """The address of a hub that refuses connections."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"  # bound, but not listening


@pytest.mark.parametrize(
    "name, full",
    [
        ("Qwen2.5-Math-7B", "Qwen/Qwen2.5-Math-7B"),
        ("Qwen3-8B", "Qwen/Qwen3-8B"),
        ("Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("DeepSeek-R1-Distill-Qwen-1.5B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"),
        ("Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B"),
        ("a/b", "a/b"),
        ("me/Qwen2.5-Math-7B", "me/Qwen2.5-Math-7B"),
    ],
)
def test_full_names(name, full):
    assert hub_module.full_name(name) == full


def test_a_folder_wins_and_a_path_is_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "Qwen2.5-Math-7B", x="")
    write(tmp_path / "Qwen" / "Qwen3-8B", x="")
    write(tmp_path, Qwen__gguf="a file")
    for folder in ("Qwen2.5-Math-7B", "./Qwen2.5-Math-7B", "Qwen/Qwen3-8B", str(tmp_path)):
        assert hub_module.model_folder(folder) == folder
    for path in (
        "./Qwen3-8B",
        "../Qwen3-8B",
        "/Qwen3-8B",
        "~/Qwen3-8B",
        "a/b/c",
        "Qwen/Qwen3-8B/x",
        "Qwen.gguf",
    ):
        with pytest.raises(ValueError, match=f"^{path}: no such folder$"):
            hub_module.model_folder(path)
    for name in ("model", "gpt2", "qwen"):
        with pytest.raises(
            ValueError,
            match=f"no such folder, and no owner is known for '{name}': give OWNER/NAME or a folder",
        ):
            hub_module.model_folder(name)


def test_processes_at_the_same_time_fetch_every_file_once(home):
    _, results, requests, files = home
    for (folder, error, _), (rows, wrong, _) in results:
        assert not error and not wrong and rows == ROWS and folder == results[0][0][0]
    fetched = {
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "model.safetensors.index.json",
        "model-1.safetensors",
        "model-2.safetensors",
    }
    assert Counter(Path(path).name for path in files) == Counter(
        [*fetched, "deepscaler.json"]
    )  # no pickle, no code, no other format
    for first in (
        ("GET", f"/api/models/{FULL_MODEL}/revision/main"),
        ("HEAD", f"/datasets/{DATA}/resolve/main/README.md"),
    ):
        assert requests.count(first) == 1  # one process fetched, the others waited
    assert {path.name for path in Path(folder).rglob("*")} == fetched
    assert Path(folder, "model-2.safetensors").read_text() == "two"


@pytest.mark.parametrize("how", ["offline", "unreachable", "online"])
def test_what_was_fetched_needs_no_hub(served, home, closed, how):
    folder, results, *_ = home
    served.requests.clear()
    env = served.env(folder, closed if how == "unreachable" else None) | (
        {"HF_HUB_OFFLINE": "1"} if how == "offline" else {}
    )
    *got, (_, unknown, _) = ask(
        env, *BOTH, ["hub", "dataset_rows", [DATA if how != "online" else "a", "test"]]
    )
    assert got == results[0] and not served.requests
    assert ("['train']" in unknown or how == "online") and "\n" not in unknown


def test_a_killed_download_is_noticed_and_completed(served, tmp_path):
    served.delays = {"model-2.safetensors": 5}
    process, offline, deadline = (
        start(served.env(tmp_path), BOTH[0]),
        served.env(tmp_path) | {"HF_HUB_OFFLINE": "1"},
        time.time() + 30,
    )
    while len(list(tmp_path.rglob("snapshots/*/*"))) < 7 and time.time() < deadline:  # all but one
        time.sleep(0.05)
    process.kill()
    process.communicate()
    served.delays = {}
    for listing in (
        True,
        False,
    ):  # older versions of the library left no listing of what there should be
        error = ask(offline, BOTH[0])[0][1]
        assert (
            "model-2.safetensors" in error
            and "python hub.py --model" in error
            and "\n" not in error
        )
        for path in tmp_path.rglob("trees/*"):
            path.unlink()
    served.requests.clear()
    folder = ask(served.env(tmp_path), BOTH[0])[0][0]
    assert Path(folder, "model-2.safetensors").read_text() == "two"
    assert [Path(path).name for path in served.downloads()] == ["model-2.safetensors"]
    for name in ("config.json", "model-1.safetensors"):
        Path(
            folder, name
        ).resolve().unlink()  # the link stays, as a cache that was cleaned up by hand has it
    for path in tmp_path.rglob("trees/*"):
        path.unlink()
    assert "config.json and 1 more files are missing" in ask(offline, BOTH[0])[0][1]


def check(env, cases):
    """Every (function, args, words): one line that holds the words."""
    for (_, args, words), (result, error, _) in zip(
        cases, ask(env, *(["hub", *case[:2]] for case in cases)), strict=True
    ):
        assert result is None and error, args
        assert "\n" not in error and len(error) < 450 and all(word in error for word in words), (
            error
        )


def test_failures_are_one_line(served, tmp_path):
    login = "`hf auth login` or set HF_TOKEN"
    check(
        served.env(tmp_path),
        [
            ("model_folder", ["Qwen-none"], ["no model Qwen/Qwen-none", "check the name", login]),
            ("dataset_rows", ["a/b"], ["no data set a/b", "check the name", login]),
            ("model_folder", ["Llama-3.1-8B"], ["meta-llama/Llama-3.1-8B is gated", login]),
            ("dataset_rows", ["a/gated"], ["a/gated is gated", login]),
            ("model_folder", ["Qwen/only-bin"], ["*.safetensors is missing"]),
            ("model_folder", ["Qwen/a b"], ["Qwen/a b cannot be loaded"]),
            ("dataset_rows", [DATA, "test"], ['"test"', "['train']"]),
            ("dataset_rows", ["a/two"], ["['x', 'y']"]),
            ("dataset_rows", ["a/two/z"], ["'z'", "['x', 'y']"]),
            ("dataset_rows", ["a/two/x"], ['"train"', "['test']"]),
            ("dataset_rows", ["a/two/x/y"], ["OWNER/NAME or OWNER/NAME/CONFIG"]),
            ("dataset_rows", ["two"], ["OWNER/NAME or OWNER/NAME/CONFIG"]),
            ("dataset_rows", ["a/broken"], ["a/broken cannot be loaded: JSON parse error"]),
            ("dataset_rows", ["a/script"], ["scripts are no longer supported"]),
            ("dataset_rows", ["a/none"], ["any data files"]),
        ],
    )
    assert not [path for path in served.downloads() if path.endswith(".bin")]
    check(
        served.env(tmp_path) | {"HF_TOKEN": "hf_without_access"},
        [  # 403, not 401
            ("model_folder", ["Llama-3.1-8B"], ["meta-llama/Llama-3.1-8B is gated", login]),
            ("dataset_rows", ["a/gated"], ["a/gated is gated", login]),
        ],
    )


@pytest.mark.parametrize("how", ["offline", "refused", "mute"])
def test_an_unreachable_hub_is_told_at_once(served, closed, tmp_path, how):
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()  # takes connections and says nothing
        url = {
            "offline": None,
            "refused": closed,
            "mute": f"http://127.0.0.1:{mute.getsockname()[1]}",
        }[how]
        env = served.env(tmp_path / "hf", url) | (
            {"HF_HUB_OFFLINE": "1"} if how == "offline" else {}
        )
        reason = {"offline": "HF_HUB_OFFLINE is set", "refused": "ConnectError", "mute": "Timeout"}[
            how
        ]
        process = start(env, ["hub", "model_folder", [MODEL]], ["hub", "dataset_rows", ["a/two/x"]])
        process.wait(timeout=20)
        told = finish(process)
    for (_, error, _), command in zip(told, ("--model Qwen/Qwen2.5-Math-7B", "--data a/two/x")):
        assert all(
            word in error
            for word in (
                f"`python hub.py {command}`",
                "cannot be reached",
                reason,
                "HF_HOME",
                "is not in",
            )
        ), error
        assert "\n" not in error


def test_configurations(served, tmp_path):
    """A configuration in the cache never stands in for another, nor for the one that the hub would choose."""
    env, x, y, solo = served.env(tmp_path), ["a/two/x", "test"], ["a/two/y"], ["a/solo"]
    assert [
        rows[0]["problem"]
        for rows, *_ in ask(env, ["hub", "dataset_rows", x], ["hub", "dataset_rows", solo])
    ] == ["x?", "y?"]
    offline = ask(
        env | {"HF_HUB_OFFLINE": "1"},
        *(["hub", "dataset_rows", call] for call in (x, solo, y, ["a/two", "test"])),
    )
    assert [row and row[0]["problem"] for row, _, _ in offline] == ["x?", "y?", None, None]
    assert all(
        "['x']" in error and "python hub.py --data a/two" in error for _, error, _ in offline[2:]
    )
    online = ask(env, ["hub", "dataset_rows", ["a/two", "test"]], ["hub", "dataset_rows", y])
    assert "['x', 'y']" in online[0][1] and online[1][0][0]["problem"] == "y?"


def test_problems_from_the_hub(served, home, tmp_path):
    from pyarrow import Table, parquet

    (tmp_path / "set" / "data").mkdir(parents=True)
    rows = [{"question": f"{i}?", "final": None if i % 4 == 3 else str(i)} for i in range(10)]
    parquet.write_table(
        Table.from_pylist(rows), tmp_path / "set" / "data" / "test-00000-of-00001.parquet"
    )
    served.add("datasets", "a/rows-1.5", tmp_path / "set")
    good, named, unnamed = ask(
        served.env(home[0]),
        *(
            ["data", "load_problems", args]
            for args in (
                [DATA],
                ["a/rows-1.5", "question", "final", "test"],
                ["a/rows-1.5", "problem", "answer", "test"],
            )
        ),
    )
    assert good == [
        [
            {"id": f"{DATA}/{i}", "problem": row["problem"], "answer": row["answer"]}
            for i, row in enumerate(ROWS)
        ],
        None,
        [],
    ]
    assert [problem["id"] for problem in named[0]] == [
        f"a/rows-1.5/{i}" for i in (0, 1, 2, 4, 5, 6, 8, 9)
    ] and not named[1]
    assert len(named[2]) == 1 and named[2][0].startswith(
        "skipped 2 of 10 rows of a/rows-1.5 (first: row 3: 'final' must be"
    )
    assert "['question', 'final']" in unnamed[1] and "--problem_key and --answer_key" in unnamed[1]


@pytest.fixture
def mirror(tmp_path):
    """(address of a server with the authors' files, its folder, the paths asked for). Its answers take half a second."""
    asked, folder = [], tmp_path / "mirror"

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_request(self, *_):
            asked.append(self.path)
            time.sleep(0.5)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder, asked
    server.shutdown()
    server.server_close()


# loads benchmarks as the ranks of a run do, the checksums of argv[1] in the place of the real ones, and prints them
LOAD = """
import json, sys
from infra import data
digests = json.loads(sys.argv[1])
data.SOURCES = {name: (file, digests.get(name, digest)) for name, (file, digest) in data.SOURCES.items()}
print(json.dumps([data.load_benchmark(name) for name in digests]))
"""


def test_benchmarks_are_downloaded_once_and_checked(mirror, tmp_path):
    address, folder, asked = mirror
    rows = [{"problem": f"{i}+{i}?", "answer": 2.0 * i, "url": "u"} for i in range(83)]
    write(folder / data.SOURCE, **{"amc__json": rows, "aime__json": rows[:30]})
    strings = [row | {"answer": str(row["answer"])} for row in rows]
    digests = {
        "amc": data.content(strings),
        "amc23": data.content(strings[43:]),
        "aime24": data.content(strings[:30]),
    }
    environment = {name: value for name, value in os.environ.items() if name != "REMIX_DATA"} | {
        "HF_HOME": str(tmp_path / "hf"),
        "REMIX_MIRROR": address,
        "NO_PROXY": "*",
        "HF_HUB_OFFLINE": "0",
    }

    def load(digests, **more):
        return subprocess.Popen(
            [sys.executable, "-c", LOAD, json.dumps(digests)],
            cwd=ROOT,
            env=environment | more,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    outputs = [process.communicate(timeout=60) for process in [load(digests) for _ in range(3)]]
    assert len({out for out, _ in outputs}) == 1 and not outputs[0][1]
    amc, amc23, aime24 = json.loads(outputs[0][0])
    assert (
        amc
        == [{"id": f"amc/{i}", "problem": f"{i}+{i}?", "answer": f"{2.0 * i}"} for i in range(83)]
        and len(aime24) == 30
    )
    assert [p["answer"] for p in amc23] == [p["answer"] for p in amc[43:]] and amc23[0][
        "id"
    ] == "amc23/0"  # AMC'23 is the end of the set of 83
    assert sorted(asked) == [
        f"/{data.SOURCE}/aime.json",
        f"/{data.SOURCE}/amc.json",
    ]  # by one of the three processes
    assert (
        load(digests, REMIX_MIRROR="http://127.0.0.1:1").communicate()[0] == outputs[0][0]
    )  # from the cache
    _, wrong = load(digests | {"amc": "0"}).communicate()
    assert "not those of amc" in wrong
    for more, why in (
        ({}, "404"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ({"REMIX_MIRROR": "http://127.0.0.1:1"}, "refused"),
    ):
        _, error = load({"minerva": "0"}, **more).communicate(timeout=60)
        assert why in error and "`python hub.py --benchmarks`" in error and "--data_dir" in error
    assert not list((tmp_path / "hf").rglob("*.tmp"))
    _, cut = load({"math500": "0"}, REMIX_MIRROR=address + "/nowhere").communicate()
    assert "404" in cut


def test_command_line(served, home, capsys):
    folder, results, *_ = home

    def run(*args):
        return subprocess.run(
            [sys.executable, ROOT / "hub.py", *args],
            env=os.environ | served.env(folder),
            capture_output=True,
            text=True,
        )

    done = run("--model", MODEL, "--data", DATA)
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout
        == f"{MODEL}: {results[0][0][0]}\n{DATA}: 20 rows in split train, columns problem, answer, solution\n"
    )
    done = run("--data", DATA, "--split", "test")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"error: {DATA} ") and "['train']" in done.stderr
    for args, word in (
        ([], "--model NAME, --data NAME or --benchmarks"),
        (["--modle", "x"], "--modle"),
        (["--model", "gpt2"], "OWNER/NAME"),
    ):
        with pytest.raises(SystemExit) as ended:
            sys.exit(hub_module.main(args))
        out, err = capsys.readouterr()
        assert (
            (ended.value.code, out, err.count("\n")) == (2, "", 1)
            and err.startswith("error: ")
            and word in err
        )


def test_import_is_light():
    code = "import hub, sys; print({'huggingface_hub', 'datasets', 'filelock', 'torch'} & set(sys.modules))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        ).stdout
        == "set()\n"
    )
