#!/usr/bin/env bash
# schemathesis' tests for pytest have one node id for all operations on pytest 9.2, and with pytest-xdist only one of them runs.
#
# `@schema.parametrize()` makes a test for each operation. pytest 9.2 derives the id of a node from its original name, which
# is the same for all of them. `--dist loadfile` keeps its work by node id, so it runs one operation and reports success.
#
# Exits with 0 if it behaves like this, with 1 if it no longer does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    schemathesis==4.32.5 pytest==9.2.0 pytest-xdist==3.8.0 hypothesis==6.170.15
cd "$folder"
cat > test_operations.py <<'PYTHON'
from pathlib import Path

import schemathesis

ANSWERS = {"responses": {"200": {"description": "OK"}}}
schema = schemathesis.openapi.from_dict(
    {
        "openapi": "3.1.0",
        "info": {"title": "three operations", "version": "1"},
        "paths": {path: {"get": ANSWERS} for path in ("/a", "/b", "/c")},
    }
)


@schema.parametrize()
def test_operation(case):
    with Path("ran.txt").open("a") as file:
        file.write(f"{case.path}\n")
PYTHON

run() {
    rm -f ran.txt
    "$folder/venv/bin/python" -m pytest --quiet -p no:cacheprovider "$@" test_operations.py > output.txt
    sort -u ran.txt | tr '\n' ' '
}

"$folder/venv/bin/python" -m pip list --disable-pip-version-check 2>/dev/null |
    grep -E '^(schemathesis|pytest|pytest-xdist) '
ids=$("$folder/venv/bin/python" -m pytest --quiet --collect-only -p no:cacheprovider test_operations.py | grep '::' | sort -u)
alone=$(run)
shared=$(run -n 2 --dist loadfile)
echo "node ids: $ids"
echo "operations that ran in one process: $alone"
echo "operations that ran with -n 2 --dist loadfile: $shared($(tail -n 1 output.txt))"
[ "$(wc -l <<< "$ids")" = 1 ] && [ "$alone" = "/a /b /c " ] && [ "$(wc -w <<< "$shared")" = 1 ]

# Output with Python 3.11.7 on Linux:
#   pytest             9.2.0
#   pytest-xdist       3.8.0
#   schemathesis       4.32.5
#   node ids: test_operations.py::test_operation
#   operations that ran in one process: /a /b /c
#   operations that ran with -n 2 --dist loadfile: /a (1 passed in 4.03s)
