"""Images as processors make them, for models that read images in a text.

Vision towers differ in what they take: whole images, tiles of them, rows of patches with a grid.
Every usual form is tried, with as many image tokens in the text as the model's own tower makes
features of an image, and a form counts only where the outputs change with the pixels.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from benchmarks.tiny_models import Draw, Inputs

MARKS = ("image_token_id", "image_token_index", "media_placeholder_token_id", "img_token_id")
MOST_MARKS = 1200  # tokens of one image
SIDES = (28, 32, 56, 64, 96, 112, 224, 336, 384)
GRID = 4  # patches in a row of an image given as patches
PIXELS = ("pixel_values", "flattened_patches", "pixel_values_images", "high_res_pixel_values")


def images_in_text(draw: Draw) -> Iterator[tuple[str, Inputs]]:
    """(name, batch) in turn, those with images first."""
    ids = {"input_ids": draw.ids}
    taken = parameters_of(draw.model)
    for name, pictures in pictures_of(draw):
        # Others would be swallowed by **kwargs.
        if any(key not in taken for key in pictures):
            continue
        yield from _in_text(draw, name, pictures, taken)
    yield "text", ids
    yield "two texts", draw.both()
    yield "text, mask", {**ids, "attention_mask": torch.ones_like(draw.ids)}
    yield "two texts, boxes", {**draw.both(), "bbox": draw.boxes() / 100}


def parameters_of(model: nn.Module) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def has_pixels(batch: Inputs) -> bool:
    return any(key in batch for key in PIXELS)


def with_other_pixels(batch: Inputs) -> Inputs:
    """The same text with other images."""
    changed = dict(batch)
    for key in PIXELS:
        if key in batch and batch[key].is_floating_point():
            changed[key] = batch[key].flip(-1) * 1.5 + 0.5
    return changed


# -------------------------------------------------------------------------------- forms of images


def pictures_of(draw: Draw) -> Iterator[tuple[str, Inputs]]:
    """Images in the forms that vision towers take."""
    vision = vision_of(draw.config)
    yield from _rows(draw, vision)
    seen: set[tuple[int, ...]] = set()
    for pixels in (*draw.images(), *(draw.noise(draw.n, 3, side, side) for side in SIDES)):
        if tuple(pixels.shape) not in seen:
            seen.add(tuple(pixels.shape))
            yield from _whole(draw, pixels)


def vision_of(config: object) -> object:
    for key in ("vision_config", "vision_tower_config", "vision_encoder_config", "vit_config"):
        found = getattr(config, key, None)
        if found is not None:
            return found
    inner = getattr(config, "thinker_config", None)
    return vision_of(inner) if inner is not None else config


def _whole(draw: Draw, pixels: Tensor) -> Iterator[tuple[str, Inputs]]:
    """Whole images, and tiles of them."""
    n, side = draw.n, pixels.shape[-1]
    sizes = torch.tensor([[side, side]] * n)
    tiled = pixels[:, None]
    yield "image", {"pixel_values": pixels}
    yield "image, sizes", {"pixel_values": pixels, "image_sizes": sizes}
    yield "images", {"pixel_values": tiled}
    yield "tiles, sizes", {"pixel_values": torch.cat([tiled, tiled], 1), "image_sizes": sizes}
    mask = torch.ones(n, 1, side, side, dtype=torch.bool)
    yield "images, mask", {"pixel_values": tiled, "pixel_attention_mask": mask}
    yield "image, mask", {"pixel_values": pixels, "pixel_mask": mask[:, 0]}
    yield "image", {"pixel_values_images": pixels}
    yield "two images", {"pixel_values": pixels, "high_res_pixel_values": pixels}
    yield "image, local", {"pixel_values": pixels, "num_local_patches": torch.zeros(n).long()}
    tiles = getattr(vision_of(draw.config), "max_num_tiles", 1) or 1
    if isinstance(tiles, int):
        chosen = {
            "aspect_ratio_ids": torch.ones(n, 1).long(),
            "aspect_ratio_mask": torch.ones(n, 1, tiles).long(),
            "cross_attention_mask": torch.ones(n, draw.ids.shape[1], 1, tiles).long(),
        }
        yield (
            "tiles, ratios",
            {"pixel_values": tiled[:, :, None].expand(-1, -1, tiles, -1, -1, -1).clone(), **chosen},
        )
    shown = torch.ones(n, draw.ids.shape[1], 1).long()
    yield "images, shown", {"pixel_values": tiled, "image_attention_mask": shown}


def _rows(draw: Draw, vision: object) -> Iterator[tuple[str, Inputs]]:
    """Rows of patches, with what says where in an image they lie."""
    patch = getattr(vision, "patch_size", 8)
    patch = patch if isinstance(patch, int) else 8
    counts = [getattr(vision, key, None) for key in ("num_channels", "in_channels", "in_chans")]
    channels = next((count for count in counts if isinstance(count, int) and count), 3)
    frames = getattr(vision, "temporal_patch_size", 1)
    times = sorted({1, frames if isinstance(frames, int) else 1}, reverse=True)
    n, per = draw.n, GRID * GRID
    grid = torch.tensor([[1, GRID, GRID]] * n)
    for time in times:
        flat = draw.noise(n * per, channels * time * patch * patch)
        yield "rows, grid", {"pixel_values": flat, "image_grid_thw": grid}
        for merge in (2, 1):
            sizes = torch.full((n,), merge)
            yield (
                "rows, grid",
                {"pixel_values": flat, "image_grid_thw": grid, "image_merge_sizes": sizes},
            )
    square = draw.noise(n * per, channels, patch, patch)
    yield "patches, grid", {"pixel_values": square, "image_grid_thw": grid}
    yield "patches, grid", {"pixel_values": square, "image_grid_hws": grid[:, 1:]}
    yield "patches, grid", {"pixel_values": square, "image_grid_hw": grid[:, 1:]}
    # A row of patches for each image.
    rows = draw.noise(n, per, channels * patch * patch)
    shapes = grid[:, 1:].clone()
    mask = torch.ones(n, per, dtype=torch.long)
    yield (
        "rows, shapes",
        {"pixel_values": rows, "spatial_shapes": shapes, "pixel_attention_mask": mask},
    )
    across = torch.stack(torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="xy"), -1)
    places = across.reshape(1, per, 2).expand(n, -1, -1).contiguous()
    for width in (channels * patch * patch, channels * (3 * patch) ** 2):
        yield (
            "rows, places",
            {"pixel_values": draw.noise(n, per, width), "image_position_ids": places},
        )
    strip = draw.noise(n, channels, patch, per * patch)
    yield "strip, sizes", {"pixel_values": strip, "target_sizes": shapes}
    yield (
        "strip, sizes",
        {"pixel_values": draw.noise(1, channels, patch, n * per * patch), "target_sizes": shapes},
    )
    # Their own place in front of the pixels.
    placed = torch.cat([places.float() + 1, rows], -1)
    yield "patches", {"flattened_patches": placed, "attention_mask": mask.float()}
    yield "patches", {"flattened_patches": placed}


# ------------------------------------------------------------------------------------- in a text


def _in_text(
    draw: Draw, name: str, pictures: Inputs, taken: set[str]
) -> Iterator[tuple[str, Inputs]]:
    """Images with a text that has places for them, or beside one."""
    marks = mark_of(draw.config)
    found = [] if marks is None else list(_counts(draw, pictures))
    for count in found:
        yield from _marked(draw, f"{name} in text", pictures, marks, count)
    # Beside the text, where attention leads from one to the other.
    yield f"{name} beside text", {**pictures, "input_ids": draw.ids}
    yield f"{name} to text", {**pictures, "decoder_input_ids": draw.ids}
    if "qformer_input_ids" in taken:
        yield (
            f"{name}, two texts",
            {**pictures, "input_ids": draw.ids, "qformer_input_ids": draw.ids},
        )
    if "bbox" in taken:
        yield f"{name}, boxes", {**pictures, **draw.both(), "bbox": draw.boxes() / 100}
    yield f"{name}, two texts", {**pictures, **draw.both()}
    if "image_embeds_position_mask" in taken:
        latent = getattr(draw.config, "latent_query_num", 4)
        mask = torch.zeros_like(draw.ids)
        mask[:, 1 : 1 + latent] = 1
        wide = torch.cat([draw.ids, draw.tokens(latent)], 1)
        longer = torch.cat([mask, torch.zeros(draw.n, latent).long()], 1)
        yield (
            f"{name} in text",
            {**pictures, "input_ids": wide, "image_embeds_position_mask": longer},
        )


def mark_of(config: object) -> int | None:
    """The token that stands for a piece of an image."""
    for part in (
        config,
        getattr(config, "thinker_config", None),
        getattr(config, "text_config", None),
    ):
        for key in MARKS:
            found = getattr(part, key, None)
            if isinstance(found, int):
                return found
    return None


def _counts(draw: Draw, pictures: Inputs) -> Iterator[int]:
    """How many features the model's own tower makes of an image."""
    owners = [draw.model, getattr(draw.model, "model", None), getattr(draw.model, "thinker", None)]
    for owner in owners:
        for method in ("get_image_features", "get_image_tokens", "get_placeholder_features"):
            function = getattr(owner, method, None)
            if function is None:
                continue
            wanted = set(inspect.signature(function).parameters)
            given = {
                key: value for key, value in pictures.items() if key in wanted or "kwargs" in wanted
            }
            try:
                with torch.no_grad():
                    rows = _rows_in(function(**given))
            except Exception:
                continue
            if rows and rows % draw.n == 0 and rows // draw.n <= MOST_MARKS:
                yield rows // draw.n
                return


def _rows_in(found: object) -> int:
    if not isinstance(found, (list, tuple, Tensor)):
        found = getattr(found, "pooler_output", None) if hasattr(found, "pooler_output") else found
    if isinstance(found, Tensor):
        wide = found.is_floating_point() and found.ndim > 1
        return found.reshape(-1, found.shape[-1]).shape[0] if wide else found.numel()
    return sum(_rows_in(part) for part in found)


def _marked(
    draw: Draw, name: str, pictures: Inputs, mark: int, count: int
) -> Iterator[tuple[str, Inputs]]:
    marks = torch.full((draw.n, count), mark)
    before = draw.ids[:, :3].clone()
    start = getattr(draw.config, "vision_start_token_id", None)
    if isinstance(start, int) and start < draw.words:
        before[:, -1] = start
    wide = torch.cat([before, marks, draw.ids[:, 3:]], 1)
    kinds = (wide == mark).long()
    batch = {**pictures, "input_ids": wide}
    yield name, {**batch, "attention_mask": torch.ones_like(wide), "mm_token_type_ids": kinds}
    yield name, {**batch, "attention_mask": torch.ones_like(wide), "token_type_ids": kinds}
    yield name, {**batch, "attention_mask": torch.ones_like(wide)}
    yield name, batch
