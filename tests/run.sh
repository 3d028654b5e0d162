#!/usr/bin/env bash
# Everything a change must pass: setup, shellcheck, ruff, pytest. Flags go to pytest: tests/run.sh -m "not libero"; the slow
# ones, left out by default, are tests/run.sh -m slow
set -Eeuo pipefail
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."
bin=$PWD/.venv/bin

run() { # name, command...
    echo "== $1" >&2
    local status=0
    "${@:2}" || status=$?
    if ((status)); then
        echo "tests/run.sh: FAILED in: $1 (exit status $status)" >&2
        exit "$status"
    fi
}

run "setup" ./start_gae_ppo_training.sh --setup-only
run "shellcheck" "$bin/shellcheck" start_gae_ppo_training.sh tests/*.sh integrations/*.sh .ci/run
run "ruff check" "$bin/ruff" check
run "ruff format --check" "$bin/ruff" format --check
# two processes; the tests of a file stay together, since they share a simulator; the long file begins early
run "pytest" "$bin/python" -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
