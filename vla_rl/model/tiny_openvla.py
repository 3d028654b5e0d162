"""Makes "tiny-openvla-random": the classes and the file layout of OpenVLA at a size for two CPU cores.

For tests, for the CPU configurations and for learning how the parts fit. Its random weights solve nothing; they are drawn
so that what it sees and reads reaches its hidden states, and so that its action distribution is broad but not uniform.
The same seed gives the same bytes. It serves both decoders, one or two images, with or without proprio. Fine-tuned on
demonstrations (vla_rl.sft) it became "tiny-openvla", which is in the repository.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from vla_rl.model.checkpoint_folder import save_checkpoint
from vla_rl.model.prismatic import Prismatic
from vla_rl.model.prismatic_config import read_config
from vla_rl.run.files import read_json
from vla_rl.run.settings import ConfigError
from vla_rl.run.task_suites import BASE_SUITES

ASSETS = Path(__file__).parents[1] / "assets"
TRAINED = ASSETS / "tiny_openvla"  # in the repository: fine-tuned on libero_spatial, see its README.md
TRAINED_BY_PPO = ASSETS / "tiny_openvla_ppo"  # likewise: the same after configs/tiny_suite.yaml
FOLDER = ASSETS / "tiny_openvla_random"  # made on first use
RECIPE = 1  # raise it when anything below changes what is written; an older folder is then made anew
SEED = 0

# The words of the 130 LIBERO instructions and of the prompt. Any other text is spelled out in characters or bytes.
WORDS = (
    "In What action should the robot take to Out alphabet and at back basket bbq between black book both bottle bottom "
    "bowl box butter cabinet caddy center cheese chocolate close compartment cookie cream drawer dressing from front "
    "frying in inside it juice ketchup left microwave middle milk moka mug next of off on open orange pan pick place plate "
    "pot pots pudding push put rack ramekin red right salad sauce shelf soup stack stove table the them to tomato top tray "
    "turn under up white wine wooden yellow a b c d e f g h i j k l m n o p q r s t u v w x y z ? : , . \n"
)
TEXT_IDS, ACTION_IDS, PADDING = 704, 256, 64  # 1024 embeddings: text, action ids, padding as in the official layout
IMAGE_SIZE = 112  # 64 patches of 14 px, as both backbones cut them
DINO, SIGLIP = "vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"
VIT = {"embed_dim": 96, "depth": 3, "num_heads": 3, "mlp_ratio": 3.0}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "vocab_size": TEXT_IDS + ACTION_IDS + PADDING,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": TEXT_IDS + ACTION_IDS,
}
# 1st and 99th percentile; round numbers near those of the LIBERO demonstrations (openvla-7b-finetuned-libero-*'s
# dataset_statistics.json): translation, rotation, gripper (unmasked: 0 closes, 1 opens)
ACTION_Q01 = [-0.75, -0.8, -0.94, -0.11, -0.2, -0.16, 0.0]
ACTION_Q99 = [0.94, 0.85, 0.94, 0.13, 0.18, 0.16, 1.0]
# x, y, z in metres, axis-angle in radians, the two fingers in metres
PROPRIO_Q01 = [-0.3, -0.4, 0.9, 2.0, -1.2, -1.2, 0.001, -0.04]
PROPRIO_Q99 = [0.2, 0.4, 1.3, 3.6, 1.2, 0.8, 0.04, -0.001]
# z of the arenas whose table is not at 0.9 m: libero_object plays on the floor, the long suites in several rooms
PROPRIO_Z = {"libero_object": (0.0, 0.4), "libero_10": (0.4, 1.3), "libero_90": (0.4, 1.3)}


def ensure_tiny_openvla(folder: Path = FOLDER) -> Path:
    """The folder of the checkpoint, made first if it is not there. Safe when several processes call it at once."""
    if is_current(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write_tiny_openvla(unfinished / "new")
        if folder.exists() and not is_current(folder):
            move(folder, unfinished / "old")
        move(unfinished / "new", folder)
    finally:
        shutil.rmtree(unfinished)
    return folder


def is_current(folder: Path) -> bool:
    try:
        return read_json(folder / "config.json").get("_tiny_recipe") == RECIPE
    except ConfigError:  # none, or torn: it is made anew
        return False


def move(source: Path, target: Path) -> None:
    """Renames; does nothing if another process was first (the target is there, or the source is gone)."""
    try:
        os.rename(source, target)
    except OSError:
        if source.exists() and not target.exists():
            raise


def write_tiny_openvla(folder: Path) -> None:
    """Writes the checkpoint (bfloat16, as the official ones): config, weights, tokenizer, statistics, processor."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", make_config())
    write_json(folder / "dataset_statistics.json", make_statistics())
    write_json(folder / "preprocessor_config.json", make_preprocessor())
    make_tokenizer().save(str(folder / "tokenizer.json"))
    network = make_network(folder)
    tensors = ((name, parameter.to(torch.bfloat16)) for name, parameter in network.named_parameters())
    save_checkpoint(folder, tensors, proprio_file="proprio_projector.safetensors")


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1))


def make_config() -> dict:
    return {
        "model_type": "openvla",
        "architectures": ["OpenVLAForActionPrediction"],
        "arch_specifier": "no-align+fused-gelu-mlp",
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "use_fused_vision_backbone": True,
        "timm_model_ids": [DINO, SIGLIP],
        "timm_override_act_layers": [None, None],
        "image_sizes": [IMAGE_SIZE, IMAGE_SIZE],
        "image_resize_strategy": "resize-naive",
        "n_action_bins": ACTION_IDS,
        "pad_to_multiple_of": PADDING,
        "pad_token_id": LLAMA["pad_token_id"],
        "text_config": LLAMA,
        "norm_stats": make_statistics(),
        "torch_dtype": "bfloat16",
        "_tiny_timm_overrides": {DINO: VIT, SIGLIP: VIT},
        "_tiny_recipe": RECIPE,
    }


def make_statistics() -> dict:
    statistics = {}
    for suite in BASE_SUITES:
        low, high = list(PROPRIO_Q01), list(PROPRIO_Q99)
        low[2], high[2] = PROPRIO_Z.get(suite, (low[2], high[2]))
        statistics[f"{suite}_no_noops"] = {
            "action": {"q01": ACTION_Q01, "q99": ACTION_Q99, "mask": [True] * 6 + [False]},
            "proprio": {"q01": low, "q99": high},
        }
    return statistics


def make_preprocessor() -> dict:
    return {
        "image_processor_type": "PrismaticImageProcessor",
        "use_fused_vision_backbone": True,
        "image_resize_strategy": "resize-naive",
        "input_sizes": [[3, IMAGE_SIZE, IMAGE_SIZE]] * 2,
        "means": [[0.485, 0.456, 0.406], [0.5, 0.5, 0.5]],  # ImageNet's for DINOv2, SigLIP's own
        "stds": [[0.229, 0.224, 0.225], [0.5, 0.5, 0.5]],
    }


def make_tokenizer() -> tokenizers.Tokenizer:
    """BPE in Llama's style: "▁" for a space, byte fallback, <unk> <s> </s> and 256 bytes first."""
    space = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = space
    first = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=TEXT_IDS - len(first), show_progress=False, special_tokens=[])
    learner.train_from_iterator([WORDS], trainer)
    learned = json.loads(learner.to_str())["model"]
    tokens = first + sorted(learned["vocab"], key=learned["vocab"].get)
    assert len(tokens) <= TEXT_IDS, f"{len(tokens)} text tokens, room for {TEXT_IDS}"
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = space
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", "first"), decoders.Fuse()])
    tokenizer.add_special_tokens(first[:3])
    return tokenizer


def make_network(folder: Path) -> Prismatic:
    """Random weights for the config.json in `folder`; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = Prismatic(read_config(folder), use_proprio=True)
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in network.named_parameters():
        initialize(name, parameter.data, generator)
    return network


def initialize(name: str, weight: Tensor, generator: torch.Generator) -> None:
    """Keeps the variance through each linear layer, so that no input is lost on the way to the last hidden state."""
    if "norm" in name or name.endswith(("gamma", "bias")):
        weight.fill_(0.0 if name.endswith("bias") else 1.0)
    elif any(part in name for part in ("embed_tokens", "pos_embed", "cls_token", "reg_token", "latent")):
        weight.normal_(generator=generator)  # as large as the patches and the projected features beside it
    else:
        # logits of standard deviation 1: an entropy about 0.5 nats below the uniform distribution's log 256 = 5.55
        weight.normal_(std=weight[0].numel() ** -0.5, generator=generator)
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        weight.mul_(2)  # attention that selects; else it averages the image away and all observations look alike
