"""Prompts through Llama-2's own tokenizer give the official ids (tests/data/prompts.json), however its file was exported.

Llama-2's vocabulary may not be kept here. npm's llama-tokenizer-js (MIT) has it, so these tests fetch that package into
a temporary folder and read its data, not its code; without npm or network they skip.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import vla_rl.model.processor
from vla_rl.model.policy import OpenVLAPolicy
from vla_rl.model.processor import prompt_text
from vla_rl.model.tiny_openvla import ensure_tiny_openvla

DATA = Path(__file__).parents[1] / "data"
PACKAGE = "llama-tokenizer-js@1.2.2"
PROMPTS = json.loads((DATA / "prompts.json").read_text())
SPECIAL = PROMPTS["special"]
TASKS = tuple(case["task"] for case in PROMPTS["cases"])


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[list[str], list[tuple[str, str]]]:
    """Llama-2's 32000 tokens in the order of their ids, and its 61249 merges."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("no npm on the PATH; it fetches Llama-2's vocabulary")
    folder = tmp_path_factory.mktemp("npm")
    command = [npm, "install", "--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund"]
    command += ["--prefer-offline", "--fetch-retries=0", PACKAGE]
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm did not fetch {PACKAGE} within 60 s")
    if result.returncode:
        code = re.search(r"code (E\w+)", result.stderr)
        pytest.skip(f"npm could not fetch {PACKAGE} ({code[1] if code else f'exit status {result.returncode}'})")
    source = (folder / "node_modules/llama-tokenizer-js/llama-tokenizer.js").read_text(encoding="utf-8")
    packed = dict(re.findall(r'^const llama_(vocab_base64|merges_binary) = "([^"]+)"', source, re.MULTILINE))
    vocab = base64.b64decode(packed["vocab_base64"]).decode().split("\n")
    pairs = np.frombuffer(base64.b64decode(packed["merges_binary"]), "<u2").reshape(-1, 2)
    assert len(set(vocab)) == 32000 and pairs.shape == (61249, 2)
    return vocab, [(vocab[left], vocab[right]) for left, right in pairs]


def export(llama, style: str) -> dict:
    """tokenizer.json as transformers 4 ("prepend") or newer ones (the Metaspace styles) write it for OpenVLA."""
    vocab, merges = llama
    ids = {token: i for i, token in enumerate(vocab)}
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>", "<PAD>")])
    if style == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", style.removeprefix("metaspace-"), split=False)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s>:1 $B:1", [("<s>", SPECIAL["bos"])])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    written = json.loads(tokenizer.to_str())
    if style == "prepend":
        written["model"]["merges"] = [" ".join(merge) for merge in written["model"]["merges"]]
        del written["model"]["ignore_merges"]
    return written


@pytest.fixture(scope="module", params=["prepend", "metaspace-first", "metaspace-always"])
def policy(request, llama, tmp_path_factory) -> OpenVLAPolicy:
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint"
    shutil.copytree(DATA / "tiny_openvla", folder)
    (folder / "tokenizer.json").write_text(json.dumps(export(llama, request.param)), encoding="utf-8")
    return OpenVLAPolicy.from_checkpoint(folder)


def test_prompts_have_the_official_ids(policy):
    for case in PROMPTS["cases"]:
        assert policy.processor.encode_prompt(case["task"]) == case["input_ids_with_29871"], case["task"]


def test_a_batch_has_the_official_ids_and_padding(policy):
    input_ids, attention_mask = policy.processor.tokenize(TASKS)
    for row, mask, case in zip(input_ids.tolist(), attention_mask.tolist(), PROMPTS["cases"], strict=True):
        ids = case["input_ids_with_29871"]
        padding = len(row) - len(ids)
        assert row == [SPECIAL["pad"]] * padding + ids, case["task"]
        assert mask == [0] * padding + [1] * len(ids), case["task"]


def test_special_tokens_have_the_official_ids(policy):
    names = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<PAD>", "empty_token_after_colon": "▁"}
    assert {name: policy.processor.tokenizer.token_to_id(token) for name, token in names.items()} == SPECIAL


@pytest.mark.parametrize("ending", ["", " "])
def test_the_space_is_appended_only_where_the_text_gives_none(policy, ending, monkeypatch):
    monkeypatch.setattr(vla_rl.model.processor, "PROMPT", vla_rl.model.processor.PROMPT + ending)
    for case in PROMPTS["cases"]:
        ids = policy.processor.tokenizer.encode(prompt_text(case["task"]), add_special_tokens=False).ids
        assert [SPECIAL["bos"], *ids] == case["input_ids_with_29871" if ending else "input_ids"], case["task"]
        assert policy.processor.encode_prompt(case["task"]) == case["input_ids_with_29871"], case["task"]


def test_prompt_and_actions_are_the_sequence_of_the_fine_tuning(policy):
    example = PROMPTS["sft_example"]
    action_ids = example["action_ids"]
    assert [*policy.processor.encode_prompt("lift"), *action_ids, SPECIAL["eos"]] == example["input_ids"]
    assert policy.processor.tokenizer.encode(example["text"]).ids == example["input_ids"]
    assert policy.processor.tokenizer.decode(example["input_ids"][1:], skip_special_tokens=False) == example["text"]
    codec = policy.action_tokenizer
    same_bin = [max(token, 31745) for token in action_ids]  # 31744 decodes as 31745
    assert codec.encode(codec.decode(np.array(action_ids))).tolist() == same_bin


def test_padding_and_truncation_left_on_in_the_file_do_not_count(tmp_path):
    """transformers writes the settings of its last call into tokenizer.json; the official code overrides them."""
    whole = OpenVLAPolicy.from_checkpoint(ensure_tiny_openvla(), unnorm_key="libero_spatial")
    folder = tmp_path / "checkpoint"
    shutil.copytree(ensure_tiny_openvla(), folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for length in (8, 64):
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length)
        tokenizer.save(str(folder / "tokenizer.json"))
        used = OpenVLAPolicy.from_checkpoint(folder, unnorm_key="libero_spatial")
        assert used.processor.encode_prompt(TASKS[0]) == whole.processor.encode_prompt(TASKS[0])
