"""vla_rl/model/prompt.py: the official text, and one space after it."""

from __future__ import annotations

import json

from tests.model.policies import DATA
from vla_rl.model.prompt import append_space, prompt_text


def test_prompt_is_the_official_text():
    cases = json.loads((DATA / "prompts.json").read_text())["cases"]
    assert len(cases) == 14
    for case in cases:
        assert prompt_text(case["task"]) == case["prompt"]
        assert append_space(case["input_ids"], 29871) == case["input_ids_with_29871"]
        assert append_space(case["input_ids_with_29871"], 29871) == case["input_ids_with_29871"]
