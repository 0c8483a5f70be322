"""The generated pages: docs/flags.md, docs/metrics.md, and the table of the family in README.

python tools/docs.py            # `make docs`: writes them
python tools/docs.py --check    # exit code 1 where one is stale
"""

import inspect
import sys
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import methods
from infra.config import FLAGS
from infra.metrics import METRICS

BEGIN, END = "<!-- family: made by `make docs` -->\n", "<!-- end -->"


def table(headers, rows):
    rows = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def flags():
    lines = [
        "# Flags of train.py",
        "",
        "Made by `make docs`. A function's own default < the row of `--algo` < the model's row <",
        "the preset's < a typed flag. Sources: README, «Where the paper is silent».",
        "A resumed run keeps what is marked fixed. An empty default of a number is its function's.",
    ]
    parts = {"Of the method (methods.py)": methods.NUMBERS, "Of the run (infra/config.py)": FLAGS}
    for title, declared in parts.items():
        rows = []
        for name, one in declared.items():
            default = "" if one.default is None else one.default
            choices = f" ({', '.join(one.choices)})" if one.choices else ""
            rows.append([f"`--{name}`", default, one.help + choices, one.source, one.fixed or ""])
        headers = ["flag", "default", "meaning", "source", "fixed"]
        lines += ["", f"## {title}", "", table(headers, rows)]
    return "\n".join(lines) + "\n"


def metrics():
    rows = [[f"`{name}`", text] for name, text in METRICS.items()]
    lines = [
        "# Metrics",
        "",
        "Made by `make docs`. Every line of metrics.jsonl has these keys, null where there is no",
        "such thing. Only `seconds_*`, `tokens_per_second` and `memory_*` depend on the machine.",
        "",
        table(["metric", "meaning"], rows),
        "",
        "What the functions of a method return comes under its own name, as a mean over tokens and",
        "updates (`clipped_low`, `clipped_high` as `clip_low_share`, `clip_high_share`), and the",
        "weights of its row as `correct_weight`, `mismatch_weight`. In their own words:",
    ]
    for name, function in methods.OBJECTIVES.items():
        lines += ["", f"`{name}`", "", "```", inspect.getdoc(function), "```"]
    return "\n".join(lines) + "\n"


def family():
    cells = ("objective", "advantage", "correct", "p", "utd", "reincarnate", "lambda_floor", "beta")
    rows = []
    for name, row in methods.ROWS.items():
        values = {cell: methods.NUMBERS[cell].default for cell in cells} | row
        rows.append([f"`{name}`", *(values[cell] for cell in cells), values["group_size"]])
    return table(["`--algo`", *(f"`--{cell}`" for cell in cells), "`--group_size`"], rows) + "\n"


def pages():
    """{path: text} of everything that is made here."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    before, rest = readme.split(BEGIN)
    return {
        ROOT / "docs" / "flags.md": flags(),
        ROOT / "docs" / "metrics.md": metrics(),
        ROOT / "README.md": before + BEGIN + family() + END + rest.split(END, 1)[1],
    }


def main():
    stale = [
        path for path, text in pages().items() if not path.exists() or path.read_text() != text
    ]
    for path in stale:
        print(f"stale: {path.relative_to(ROOT)} (make docs)")
    if "--check" in sys.argv:
        return bool(stale)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
