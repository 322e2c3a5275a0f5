"""`python -m lilora_kernels`: what `lilora info` prints, with torch alone. `--json` makes it one JSON document."""

import argparse
import json

from lilora_kernels.facts import info, rows


def main() -> None:
    parser = argparse.ArgumentParser("python -m lilora_kernels", description="Show versions, devices and backends.")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    options = parser.parse_args()
    facts = info()
    if options.json:
        print(json.dumps(facts))
        return
    for name, value in rows(facts):
        print(f"{name:20}{value}")


if __name__ == "__main__":
    main()
