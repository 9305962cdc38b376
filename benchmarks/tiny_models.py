"""Tiny models of any architecture of transformers, with random weights, and inputs they take.

A general rule shrinks a default config, with a few special cases; both stand in
``tiny_models.yaml``. Nobody says which inputs a class wants: a list of usual ones is tried.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import yaml
from torch import Tensor, nn

from benchmarks.tiny_images import has_pixels, images_in_text, with_other_pixels

TABLES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
SIZES: dict[str, int] = {}
for _size, _names in TABLES["sizes"].items():
    SIZES.update(dict.fromkeys(_names.split(), _size))
LAYERS = (
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
    *("depth", "encoder_layers", "decoder_layers"),
)
PICTURES = ("vision_config", "backbone_config")
SOUNDS = ("audio_config", "encoder_config", "speech_encoder")
BANDS = (
    *("num_mel_bins", "input_feat_per_channel", "n_mel_bins", "feature_size"),
    *("input_dim", "feature_projection_input_dim"),
)
VOCABULARY, WORDS, TOKENS = 160, 100, 12
MOST_PARAMETERS = 60_000_000
Inputs = dict[str, Tensor]
Config = transformers.PreTrainedConfig


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """A model that runs, and ``make(n)`` for a batch of n items that it takes."""

    model: nn.Module
    make: Callable[[int], Inputs]
    inputs: str  # what they are: text, image, ...
    items: Callable[[int], list[Inputs]]  # batches of one, each other
    sees: bool = False  # the outputs change with the pixels


# ------------------------------------------------------------------------------------ tiny configs


def tiny(cls: type, *, narrow: bool, ids: Iterator[int] | None = None) -> dict[str, object]:
    """Arguments for a config with few layers and, when ``narrow``, few channels."""
    try:
        default = cls()
    except Exception:
        return {}
    # 1. What the default says about its layers.
    fields = vars(default)
    ids = ids or itertools.count(101)
    layers = layers_needed(default)
    before = next((fields[k] for k in LAYERS if isinstance(fields.get(k), int)), None)
    # 2. Every field by its type; None leaves the default.
    asked: dict[str, object] = {}
    for key, value in fields.items():
        if isinstance(value, Config):
            kind = type(value)
            asked[key] = kind(**tiny(kind, narrow=narrow, ids=ids))
        elif isinstance(value, int) and not isinstance(value, bool):
            asked[key] = small_integer(key, value, narrow=narrow, layers=layers, ids=ids)
        elif isinstance(value, (list, tuple)) and value:
            per_layer = before == len(value) and is_field(cls, key)
            asked[key] = small_list(key, value, per_layer, asked.get("num_hidden_layers", layers))
        elif narrow and isinstance(value, dict) and "mrope_section" in value:
            asked[key] = {**value, "mrope_section": [2, 1, 1]}
    # 3. What a rule field by field cannot know.
    asked = {key: value for key, value in asked.items() if value is not None}
    if narrow and "kv_lora_rank" in fields and "num_key_value_heads" in asked:
        asked["num_key_value_heads"] = 4  # latent attention: a key and a value for every head
    return {**asked, **TABLES["special"].get(cls.model_type, {})} if narrow else asked


def layers_needed(config: Config) -> int:
    """Two, or as many as show each of the config's kinds of layer, six at most."""
    needed = 2
    for key in ("layer_types", "mlp_layer_types", "layers_block_type"):
        with contextlib.suppress(Exception):  # some configs compute them, and not from defaults
            kinds = list(getattr(config, key, None) or ())
            seen = (n for n in range(1, len(kinds) + 1) if set(kinds[:n]) == set(kinds))
            needed = max(needed, min(next(seen, 0), 6))
    return needed


def small_integer(
    key: str, value: int, *, narrow: bool, layers: int, ids: Iterator[int]
) -> int | None:
    """The value of an integer of a tiny config; ``None`` leaves the default."""
    if key in LAYERS:
        return min(layers, max(value, 2))
    if key in SIZES:
        if narrow or "vocab" in key or value > 4096:
            return min(SIZES[key], value) if value > 0 else value
        return None
    # Special tokens keep apart from each other, inside the small vocabulary.
    if key.endswith(("token_id", "token_index")) and value >= VOCABULARY - 60:
        return next(ids)
    return None


def small_list(key: str, value: list | tuple, per_layer: bool, layers: int) -> object | None:
    if key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        return 2
    if key == "depths":
        return [1] * len(value)
    return list(value)[:layers] if per_layer else None


def is_field(cls: type, key: str) -> bool:
    found = inspect.getattr_static(cls, key, None)
    return found is not None and not isinstance(found, property)


def configs_for(arch: str, errors: list[str]) -> Iterator[Config]:
    """Configs to try in turn, smallest first: narrow, with default widths, cut afterwards."""
    cls = transformers.CONFIG_MAPPING[arch]
    for narrow in (True, False):
        try:
            config = cls(**tiny(cls, narrow=narrow))
        except Exception as error:
            errors.append(f"config: {said(error)}")
            continue
        with contextlib.suppress(Exception):
            config.num_labels = 4
        yield config
    try:
        config = cls()
    except Exception as error:
        errors.append(f"config: {said(error)}")
        return
    # A config that takes no arguments of this kind may take them as attributes.
    parts = [part for part in vars(config).values() if hasattr(part, "model_type")]
    for part in (config, *parts):
        for key in LAYERS:
            if isinstance(vars(part).get(key), int):
                setattr(part, key, 2)
    yield config


# ------------------------------------------------------------------------------------------ inputs


def special_tokens(config: object) -> set[int]:
    """Tokens that a config, or a part of it, gives a meaning."""
    found: set[int] = set()
    for key, value in vars(config).items():
        if hasattr(value, "model_type"):
            found |= special_tokens(value)
        elif isinstance(value, int) and re.search(r"token_(id|index)$", key):
            found.add(value)
    return found


class Draw:
    """Random inputs of ``n`` items, the same each time, as tries that a model may take or not."""

    def __init__(self, config: Config, model: nn.Module, n: int, seed: int = 1) -> None:
        self.config, self.model, self.n = config, model, n
        self.generator = torch.Generator().manual_seed(seed)
        self.text = getattr(config, "text_config", None) or config
        try:
            words = model.get_input_embeddings().num_embeddings
        except Exception:
            words = getattr(self.text, "vocab_size", VOCABULARY)
        self.words = words
        self.ids = self.tokens(TOKENS)
        self.labels = torch.arange(n) % 2

    def tokens(self, length: int) -> Tensor:
        # Tokens that stand for images or ends would mean something.
        most = max(4, min(self.words, WORDS))
        special = special_tokens(self.config)
        plain = torch.tensor([t for t in range(3, most) if t not in special] or [3])
        places = torch.randint(0, len(plain), (self.n, length), generator=self.generator)
        return plain[places]

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def both(self) -> Inputs:
        return {"input_ids": self.ids, "decoder_input_ids": self.ids.flip(1)}

    def boxes(self) -> Tensor:
        corners = torch.randint(0, 100, (self.n, TOKENS, 4), generator=self.generator)
        return corners.sort(-1).values

    def tries(self, category: str) -> Iterator[tuple[str, Inputs]]:
        """(name, batch) in turn; the first that the model takes is used."""
        ids = {"input_ids": self.ids}
        if category in ("causal-lm", "masked-lm", "encoder"):
            yield "text", ids
            yield "text, mask", {**ids, "attention_mask": torch.ones_like(self.ids)}
            yield "long text", {"input_ids": self.tokens(32)}
            yield "two texts", self.both()
            yield "text, boxes", {**ids, "bbox": self.boxes()}
            for pixels in self.images():
                yield "text, image", {**ids, "pixel_values": pixels}
        elif category == "seq-cls":
            ends = getattr(self.text, "eos_token_id", 2)
            self.ids[:, -1] = ends if isinstance(ends, int) and ends < self.words else 2
            labels = {"labels": self.labels}
            yield "text", {**ids, **labels}
            yield "text, boxes", {**ids, "bbox": self.boxes(), **labels}
            yield "long text", {"input_ids": self.tokens(32), **labels}
        elif category == "seq2seq":
            yield "two texts", self.both()
            yield "two long texts", {"input_ids": self.tokens(32), "decoder_input_ids": self.ids}
            yield from self.audio()
            yield "text", ids
        elif category == "image-cls":
            yield from self.labelled_images()
        elif category == "image-text":
            yield from images_in_text(self)
        elif category == "speech":
            yield from self.audio()
        else:
            for name, batch in self.audio():
                batch.pop("decoder_input_ids", None)
                yield name, {**batch, "labels": self.labels}

    def images(self) -> Iterator[Tensor]:
        parts = (self.config, *(getattr(self.config, k, None) for k in PICTURES))
        for part in parts:
            size = getattr(part, "image_size", None)
            if size:
                side = size if isinstance(size, int) else next(iter(size))
                yield self.noise(self.n, channels_of(part), side, side)
        for side in (32, 64, 224):
            yield self.noise(self.n, 3, side, side)

    def labelled_images(self) -> Iterator[tuple[str, Inputs]]:
        labels = {"labels": self.labels}
        for pixels in self.images():
            yield "image", {"pixel_values": pixels, **labels}
        patches = {
            "pixel_values": self.noise(self.n, 16, 3 * 256),
            "pixel_attention_mask": torch.ones(self.n, 16, dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4]] * self.n),
        }
        yield "patches, mask", {**patches, **labels}
        yield "image", {"inputs": self.noise(self.n, 3, 224, 224), **labels}

    def audio(self) -> Iterator[tuple[str, Inputs]]:
        bands = 16
        parts = [getattr(self.config, key, None) for key in SOUNDS]
        for part, key in itertools.product((self.config, *parts), BANDS):
            found = getattr(part, key, None)
            bands = found if isinstance(found, int) else bands
        length = 2 * (getattr(self.config, "max_source_positions", None) or 64)
        frames = getattr(self.config, "max_length", None) or 64
        features = self.noise(self.n, bands, length)
        turned = features.transpose(1, 2).contiguous()
        mask = torch.ones(self.n, length, dtype=torch.long)
        answer = {"decoder_input_ids": self.ids}
        yield "features", {"input_features": features, **answer}
        yield "features, turned", {"input_features": turned, **answer}
        for samples in (1600, 8000):
            yield "wave", {"input_values": self.noise(self.n, samples), **answer}
        yield "spectrum", {"input_values": self.noise(self.n, frames, bands), **answer}
        yield "text", {"input_ids": self.ids}
        for found in (features, turned):
            yield "features, mask", {"input_features": found, "attention_mask": mask, **answer}


def channels_of(config: Config) -> int:
    found = getattr(config, "num_channels", None) or getattr(config, "in_channels", None)
    return found if isinstance(found, int) and found else 3


# ---------------------------------------------------------------------------------------- building


def outputs(model: nn.Module, batch: Inputs) -> Tensor:
    """The model's logits, or its last hidden states where it has no head. One forward pass."""
    arguments: dict[str, object] = {k: v for k, v in batch.items() if k != "labels"}
    if getattr(model.config, "use_cache", False):
        arguments["use_cache"] = False
    return logits_in(model(**arguments))


def logits_in(output: object) -> Tensor:
    for key in ("logits", "last_hidden_state"):
        found = getattr(output, key, None)
        if found is not None:
            return found[0] if isinstance(found, (tuple, list)) else found
    if isinstance(output, Tensor):
        return output
    return logits_in(next(iter(output.values())) if isinstance(output, dict) else output[0])


def build(category: str, arch: str, cls: type) -> TinyModel:
    """The smallest config that runs. Raises ``RuntimeError`` with what every try said."""
    errors: list[str] = []
    for config in configs_for(arch, errors):
        try:
            model = with_random_weights(cls, config)
        except Exception as error:
            errors.append(f"model: {said(error)}")
            continue
        for name, batch in Draw(config, model, 2).tries(category):
            try:
                make = maker(config, model, category, form_of(name, batch))
                settle_(model, make)
                if not outputs(model, batch).isfinite().all():
                    errors.append(f"{name}: outputs are not finite")
                    continue
                sees = category == "image-text" and has_pixels(batch)
                if sees and not changes_with_pixels(model, make(1)):
                    errors.append(f"{name}: the outputs do not change with the pixels")
                    continue
            except Exception as error:
                errors.append(f"{name}: {said(error)}")
                continue
            items = item_maker(config, model, category, form_of(name, batch))
            return TinyModel(model=model, make=make, inputs=name, items=items, sees=sees)
    raise RuntimeError(" | ".join(errors)[:3000])


@torch.no_grad()
def changes_with_pixels(model: nn.Module, item: Inputs) -> bool:
    found, other = (outputs(model, batch) for batch in (item, with_other_pixels(item)))
    return found.shape == other.shape and float((found - other).abs().max()) > 0


def maker(
    config: Config, model: nn.Module, category: str, form: object, seed: int = 1
) -> Callable[[int], Inputs]:
    def make(n: int) -> Inputs:
        tries = Draw(config, model, n, seed).tries(category)
        return next(batch for name, batch in tries if form_of(name, batch) == form)

    return make


def item_maker(
    config: Config, model: nn.Module, category: str, form: object
) -> Callable[[int], list[Inputs]]:
    """Items as a processor makes them: batches of one, each with other contents."""

    def items(n: int) -> list[Inputs]:
        return [maker(config, model, category, form, seed)(1) for seed in range(1, n + 1)]

    return items


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:160]}"


def form_of(name: str, batch: Inputs) -> tuple[str, dict[str, torch.Size]]:
    return name, {key: tensor.shape[1:] for key, tensor in batch.items()}


def with_random_weights(cls: type, config: Config) -> nn.Module:
    # Without memory first: a default config may have billions of parameters.
    with contextlib.suppress(NotImplementedError, RuntimeError), torch.device("meta"):
        count = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
        if count > MOST_PARAMETERS:
            raise ValueError(f"{count:,} parameters are too many here")
    torch.manual_seed(0)  # transformers draws from the global generator
    model = cls(copy.deepcopy(config)).eval()
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        # Weights that begin as constants would hide errors.
        constant = p.numel() < 2 or (p.ndim >= 2 and float(p.detach().float().std()) == 0)
        if p.is_floating_point() and constant:
            p.data.normal_(0, 0.02, generator=generator)
    return model


@torch.no_grad()
def settle_(model: nn.Module, make: Callable[[int], Inputs]) -> None:
    """What training would have done: no branch is scaled to nothing, and BatchNorm's statistics
    fit the activations."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    norms = [m for m in model.modules() if isinstance(m, kinds) and m.track_running_stats]
    scales = ("layer_scale", "lambda_", "gamma", ".ls")
    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        # LayerScale begins near zero.
        is_scale = p.ndim <= 2 and p.numel() > 1 and any(word in name for word in scales)
        if is_scale and float(p.abs().max()) < 1e-2:
            p.uniform_(0.5, 1.5, generator=generator)
    if not norms:
        return
    for norm in norms:
        # The last norm of a residual branch often begins at zero.
        if not bool(norm.weight.any()):
            norm.weight.fill_(1.0)
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None
    try:
        outputs(model, make(32))
    finally:
        for norm in norms:
            norm.eval()
            norm.momentum = 0.1
