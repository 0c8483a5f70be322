"""README names every flag with its default, every metric with its line, and only files and functions that exist."""

import dataclasses
import re
from pathlib import Path

from infra import memory
from infra.config import Config, parse
from infra.metrics import METRICS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_flag_stands_in_the_table_with_default_and_source():
    for f in dataclasses.fields(Config):
        default = "" if f.default is None else f.default
        assert (
            f"| `--{f.name}` | {default} | {f.metadata['help']} | {f.metadata['source']} |"
            in README
        )


def test_every_metric_stands_in_the_table():
    for name, text in METRICS.items():
        assert f"| `{name}` | {text} |" in README


def test_every_fault_has_a_test_that_exists():
    rows = (
        README.split("## When something goes wrong")[1]
        .split("\n## ")[0]
        .split("| --- | --- | --- | --- |\n")[1]
        .split("\n\n")[0]
        .splitlines()
    )
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row.rpartition(" | ")[2])
        assert named and row.count(" | ") == 3, row
        for name in named:
            assert f"\ndef {name}(" in tests, name


def test_reading_guide_names_what_exists():
    guide = README.split("## Reading guide")[1].split("\n## ")[0]
    named = re.findall(r"`(\w+\.py)`((?:,? `[\w.]+`)*)", guide)
    assert len(named) > 12
    for file, names in named:
        text = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"`([\w.]+)`", names):
            last = name.split(".")[-1]
            assert re.search(rf"\b(def|class) {last}\b", text), f"{file} {name}"


def test_memory_table_is_what_the_dry_run_computes():
    rows = re.findall(r"^\| `(.*)` \| (\d+) x (\d+) \| (.*) \|$", README, re.M)
    assert len(rows) == 8
    for flags, gpus, size, cells in rows:
        cfg = parse(flags.split())
        p = memory.plan(cfg, memory.shape_of(cfg.model), int(gpus), int(size))
        wanted = [
            *(f"{p['total'][column] / memory.GIB:.1f}" for column in ("training", "generating")),
            str(p["engine"]["tokens"] // p["engine"]["length"]),
            f"{max(p['host'].values()) / memory.GIB:.1f}",
        ]
        assert cells.split(" | ") == [*wanted, "does not fit" if p["short"] else "fits"], flags
