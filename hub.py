"""Models and data sets by name: resolve, fetch once per machine, work offline.

    python hub.py --model Qwen2.5-Math-7B                              # fetches, prints the folder
    python hub.py --data agentica-org/DeepScaleR-Preview-Dataset       # fetches, prints the number of rows
    python hub.py --benchmarks                                         # fetches the five benchmarks

What lies whole in the cache (HF_HOME) is taken from there without asking the hub, so a run does not change when the hub
does; `hf cache rm` makes it forget. Weights are safetensors and data sets plain files: nothing fetched here is executed.
"""

import argparse
import hashlib
import http.client
import json
import logging
import os
import re
import sys
import urllib.request
from pathlib import Path

from infra.memory import splits

# the beginning of a bare name: its owner
OWNERS = {
    "Qwen": "Qwen",
    "DeepSeek-": "deepseek-ai",
    "Llama-": "meta-llama",
    "Meta-Llama-": "meta-llama",
}
MODEL_TYPES = (
    "qwen2",
    "qwen3",
    "llama",
)  # a decoder in `model`, its layers in `model.layers`, a head in `lm_head`
MODEL_FILES = ("*.safetensors", "*.json", "tokenizer.model", "merges.txt", "vocab.txt", "*.jinja")
TIMEOUT = 10  # seconds until the hub counts as unreachable


def full_name(name: str) -> str:
    """OWNER/NAME of a model; a bare name gets its owner from OWNERS. Raises ValueError."""
    if "/" in name:
        return name
    for beginning, owner in OWNERS.items():
        if name.startswith(beginning):
            return f"{owner}/{name}"
    raise ValueError(
        f"no such folder, and no owner is known for {name!r}: give OWNER/NAME or a folder"
    )


def model_folder(name: str | os.PathLike) -> str:
    """The folder of a model: `name` itself where that is a folder, else the cached snapshot of the hub's model of that name,
    fetched first if need be. All ranks may call it at the same time. Raises ValueError (one line)."""
    name = os.fspath(name)
    if os.path.isdir(name):
        return name
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or os.path.exists(name):
        raise ValueError(f"{name}: no such folder")
    from huggingface_hub import snapshot_download

    name = full_name(name)

    def load(local):  # root files only: folders hold other formats of the same weights
        folder = snapshot_download(
            name, allow_patterns=MODEL_FILES, ignore_patterns="*/*", local_files_only=local
        )
        if missing := _missing(folder):
            raise ValueError(
                f"{missing} missing in {folder} (weights are read from *.safetensors only)"
            )
        return folder

    return _fetch("model", name, lambda: load(True), lambda: load(False))


def _missing(folder):
    """What keeps a snapshot from being whole, "" if nothing: a killed download may leave any part of it."""
    index = Path(folder, "model.safetensors.index.json")
    shards = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else ()
    if outside := [name for name in shards if Path(name).name != name]:
        raise ValueError(f"its {index.name} names a file outside its folder: {outside[0][:60]!r}")
    absent = sorted(name for name in ("config.json", *shards) if not Path(folder, name).is_file())
    if not absent and not any(Path(folder).glob("*.safetensors")):
        absent = ["*.safetensors"]
    return (
        absent[0] + (f" and {len(absent) - 1} more files are" if absent[1:] else " is")
        if absent
        else ""
    )


def check_model(folder, tp=1):
    """Raise ValueError unless `folder` holds a whole Hugging Face model that this code can train, on `tp` tensor-parallel ranks each engine."""
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"--model {folder}: no such folder")
    try:
        config = json.loads((path / "config.json").read_text())
        kind = config["model_type"]
        if kind not in MODEL_TYPES:
            raise ValueError(f"it is of type {kind}, this code trains {', '.join(MODEL_TYPES)}")
        hidden, vocab, layers, heads = (
            config[name]
            for name in ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads")
        )
        kv_heads = config.get("num_key_value_heads") or heads
        if not all(
            isinstance(n, int) and n > 0
            for n in (hidden, vocab, layers, heads, kv_heads, config["intermediate_size"])
        ):
            raise ValueError("a size in its config.json is no positive number")
        if "quantization_config" in config:
            raise ValueError("it is quantized: take the model that it was made from")
        if absent := _missing(folder):
            raise ValueError(f"{absent} missing")
        tensors = {}  # name -> (file, first byte, last byte, shape)
        for file in path.glob(
            "*.safetensors"
        ):  # each begins with the length of a JSON header of its tensors
            with open(file, "rb") as header:
                length = int.from_bytes(header.read(8), "little")
                found = {
                    name: (file, *(8 + length + i for i in tensor["data_offsets"]), tensor["shape"])
                    for name, tensor in json.loads(header.read(length)).items()
                    if name != "__metadata__"
                }
            if max((last for _, _, last, _ in found.values()), default=0) != file.stat().st_size:
                raise ValueError(f"{file.name} is not whole: copy it again")
            tensors |= found
        embedding, head = (
            tensors.get(name) for name in ("model.embed_tokens.weight", "lm_head.weight")
        )
        if embedding is None or f"model.layers.{layers - 1}.mlp.up_proj.weight" not in tensors:
            raise ValueError(
                f"its *.safetensors hold no model.embed_tokens.weight or not all {layers} layers"
            )
        if embedding[3] != [vocab, hidden]:
            raise ValueError(
                f"its embedding is {embedding[3]}, its config.json says {[vocab, hidden]}"
            )
        if (
            config.get("tie_word_embeddings")
            and head
            and digest(*head[:3]) != digest(*embedding[:3])
        ):  # sharding would keep one of the two
            raise ValueError(
                "its config.json says that head and embedding are one (tie_word_embeddings), its weights hold two: set it to false"
            )
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        MemoryError,
        RecursionError,
    ) as error:
        why = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"--model {folder} is no model folder that can be trained ({why}); it needs config.json and whole *.safetensors"
        ) from None
    if not splits(tp, heads, kv_heads):
        raise ValueError(
            f"--tp {tp} does not divide the {heads} attention heads and {kv_heads} key-value heads of {folder}"
        )


def digest(file, first, last):
    """A hash of a file's bytes from `first` to `last`."""
    found = hashlib.blake2b()
    with open(file, "rb") as data:
        data.seek(first)
        while first < last and (part := data.read(min(1 << 24, last - first))):
            found.update(part)
            first += len(part)
    return found.digest()


def dataset_rows(name: str, split: str = "train"):
    """The rows (dicts; has a length) of the hub's data set OWNER/NAME, or of its configuration OWNER/NAME/CONFIG.
    All ranks may call it at the same time. Raises ValueError (one line)."""
    if name.count("/") not in (1, 2):
        raise ValueError(f"{name!r} is no name of a data set: give OWNER/NAME or OWNER/NAME/CONFIG")
    import datasets

    owner, title, config = [*name.split("/"), None][:3]
    chosen = Path(
        datasets.config.HF_DATASETS_CACHE, f"{owner}--{title}.config"
    )  # the one that the hub took where none was named
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # it warns of every use of its cache
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()

    def load(config):
        return datasets.load_dataset(f"{owner}/{title}", config, split=split)

    def cached():
        before, datasets.config.HF_HUB_OFFLINE = (
            datasets.config.HF_HUB_OFFLINE,
            True,
        )  # load_dataset has no argument for it
        try:
            return load(config or (chosen.read_text() if chosen.exists() else "default"))
        finally:
            datasets.config.HF_HUB_OFFLINE = before

    def fetched():
        rows = load(config)
        if not config:
            chosen.write_text(rows.config_name)
        return rows

    return _fetch("data", name, cached, fetched)


def public_file(name: str) -> Path:
    """The file OWNER/REPOSITORY/COMMIT/PATH of a public GitHub repository, in HF_HOME, downloaded first if need be ($REMIX_MIRROR: from
    another server with the same paths). All ranks may call it at the same time. Raises HubError."""
    from filelock import FileLock
    from huggingface_hub import constants

    path = Path(constants.HF_HOME, "remix", *name.split("/"))
    if path.exists():
        return path
    server = os.environ.get("REMIX_MIRROR", "https://raw.githubusercontent.com")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(path.name + ".lock")):
            if not path.exists():  # another process may have fetched it meanwhile
                if constants.HF_HUB_OFFLINE:
                    raise OSError("HF_HUB_OFFLINE is set")
                with urllib.request.urlopen(f"{server}/{name}", timeout=TIMEOUT) as answer:
                    aside = path.with_name(path.name + ".tmp")
                    aside.write_bytes(answer.read())
                    aside.rename(path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise HubError(
            f"{name} is not in {constants.HF_HOME} and could not be fetched from {server} ({type(error).__name__}: {one_line(error)}): run "
            "`python hub.py --benchmarks` with internet access, then copy or share HF_HOME, or pass --data_dir"
        ) from None
    return path


class HubError(ValueError):
    """One line: what is wrong and what to do."""


def _fetch(kind, name, cached, fetched):
    """What cached() returns or else, one process of the machine at a time, fetched(). Raises HubError."""
    import huggingface_hub
    from filelock import FileLock
    from huggingface_hub import constants, errors

    huggingface_hub.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    command, home, what = (
        f"`python hub.py --{kind} {name}`",
        constants.HF_HOME,
        "data set" if kind == "data" else kind,
    )
    lock = FileLock(Path(home, f".{kind}--{name.replace('/', '--')}.lock"))
    try:
        return cached()
    except Exception as error:  # not there, or not whole
        found = error
    try:
        try:  # first, because the libraries try for minutes; not under the lock, so that all ranks know at once
            huggingface_hub.HfApi().repo_info(
                "/".join(name.split("/")[:2]), repo_type=what.replace(" ", ""), timeout=TIMEOUT
            )
        except (errors.HfHubHTTPError, errors.HFValidationError):
            raise
        except Exception as error:
            absent = isinstance(found, (FileNotFoundError, ConnectionError)) and not isinstance(
                found, errors.IncompleteSnapshotError
            )
            state = (
                f"is not in {home}" if absent else f"in {home} cannot be used ({one_line(found)})"
            )
            offline = isinstance(error, errors.OfflineModeIsEnabled)
            reason = (
                "HF_HUB_OFFLINE is set" if offline else f"{type(error).__name__}: {one_line(error)}"
            )
            raise HubError(
                f"{name} {state}, and the hub cannot be reached ({reason}): run {command} with internet access, "
                "then copy or share HF_HOME"
            ) from None
        os.makedirs(home, exist_ok=True)
        with lock:
            try:
                return cached()  # another process has fetched it meanwhile
            except Exception:
                return fetched()
    except HubError:
        raise
    except Exception as error:
        login = "`hf auth login` or set HF_TOKEN"
        if isinstance(error, errors.GatedRepoError) or "gated dataset" in str(error):
            advice = (
                f"{name} is gated: ask for access on its page on the hub, then log in with {login}"
            )
        elif isinstance(error, errors.RepositoryNotFoundError):
            advice = f"the hub has no {what} {name} that you may read: check the name; for a private one log in with {login}"
        else:
            advice = f"{name} cannot be loaded: {one_line(error.__cause__ or error)}"
            advice += (
                ""
                if isinstance(error, ValueError)
                else f"; if the download broke off, {command} goes on with it"
            )
        raise HubError(advice) from None


def one_line(error):
    """The text of an error in one line of bounded length, without the libraries' advice."""
    text = re.split(
        r"\. Outgoing traffic|\n *Example of usage", str(error) or type(error).__name__
    )[0]
    return " ".join(text.split())[:300]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="hub.py", description="Fetch a model, a data set or the benchmarks into HF_HOME."
    )
    parser.add_argument("--model", metavar="NAME", help="OWNER/NAME, or NAME of a well-known owner")
    parser.add_argument("--data", metavar="NAME", help="OWNER/NAME, or OWNER/NAME/CONFIG")
    parser.add_argument("--split", default="train", help="split of --data [default train]")
    parser.add_argument("--benchmarks", action="store_true", help="the benchmarks of eval.py")
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    args = parser.parse_args(argv)
    try:
        if not (args.model or args.data or args.benchmarks):
            raise ValueError("nothing to fetch: give --model NAME, --data NAME or --benchmarks")
        if args.model:
            print(f"{args.model}: {model_folder(args.model)}")
        if args.data:
            rows = dataset_rows(args.data, args.split)
            print(
                f"{args.data}: {len(rows)} rows in split {args.split}, columns {', '.join(rows.column_names)}"
            )
        if args.benchmarks:
            from infra import data

            for name in data.BENCHMARKS:
                print(f"{name}: {len(data.load_benchmark(name))} problems")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
