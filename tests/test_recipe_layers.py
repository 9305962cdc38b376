"""A recipe laid over layers: which options each may get, and which layers share one.

The expected line of a complaint is the one that carries the comment ``#!`` in the YAML itself.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from curvprune.model import Groups
from curvprune.options import Keep, Quantize, check_fits
from curvprune.run import RecipeError, assign_groups, assign_options, load_recipe, lock_text
from tests.recipe_texts import BUDGET, COMPRESS, DATA, MODEL, marked_line, write

LAYERS = {
    "model.embed_tokens": (100, 64),
    "model.layers.0.q_proj": (64, 64),
    "model.layers.0.down_proj": (64, 96),
    "model.layers.1.q_proj": (64, 64),
}


def test_the_first_entry_that_matches_wins_and_the_rest_is_left_out(tmp_path: Path) -> None:
    text = """\
compress:
  - layers: ["*.down_proj"]
    options: [keep]
  - layers: "model.layers.*"
    options: [{quantize: {bits: 4, group_size: 64}}, {quantize: {bits: 8}}]
"""
    recipe = load_recipe(write(tmp_path, MODEL + DATA + text + BUDGET))
    both = [Quantize(bits=4, group_size=64), Quantize(bits=8)]
    assigned = assign_options(recipe, LAYERS)
    assert assigned == {
        "model.layers.0.q_proj": both,
        "model.layers.0.down_proj": [Keep()],
        "model.layers.1.q_proj": both,
    }
    assert list(assigned) == [name for name in LAYERS if name != "model.embed_tokens"]


def test_globs_of_one_entry_may_overlap(tmp_path: Path) -> None:
    text = 'compress:\n  - layers: ["model.layers.*", "*.q_proj"]\n    options: [keep]\n'
    assert len(assign_options(load_recipe(write(tmp_path, MODEL + DATA + text)), LAYERS)) == 3


def assignment_error(
    folder: Path,
    text: str,
    layers: dict[str, tuple[int, int]] = LAYERS,
    reader: str | None = None,
) -> str:
    full = MODEL + DATA + text
    recipe = load_recipe(write(folder, full + BUDGET))
    with pytest.raises(RecipeError) as caught:
        assign_options(
            recipe,
            layers,
            check=lambda name, option: check_fits(option, name, layers[name], reader=reader),
        )
    assert caught.value.line == marked_line(full), str(caught.value)
    assert str(caught.value).startswith(f"{folder / 'recipe.yaml'}:{caught.value.line}: compress[")
    return str(caught.value)


def test_a_glob_that_matches_no_layer_names_the_nearest(tmp_path: Path) -> None:
    text = """\
compress:
  - layers:
      - "model.layers.*"
      - "model.embed_token" #!
    options: [keep]
"""
    message = assignment_error(tmp_path, text)
    assert "compress[0].layers[1]: 'model.embed_token' matches none of the 4 layers" in message
    assert message.endswith("nearest layer: model.embed_tokens")
    assert "nearest layer: model.layers.1.q_proj" in assignment_error(
        tmp_path, 'compress:\n  - layers: "model.layer.1.q_*" #!\n    options: [keep]\n'
    )


def test_an_entry_leaves_alone_what_it_excludes(tmp_path: Path) -> None:
    text = """\
compress:
  - layers: "model.layers.*"
    exclude: ["*.1.*"]
    options: [{quantize: {bits: 8}}]
  - layers: "*.q_proj"
    exclude: "*.0.*"
    options: [keep]
"""
    assigned = assign_options(load_recipe(write(tmp_path, MODEL + DATA + text + BUDGET)), LAYERS)
    assert assigned == {
        "model.layers.0.q_proj": [Quantize(bits=8)],
        "model.layers.0.down_proj": [Quantize(bits=8)],
        "model.layers.1.q_proj": [Keep()],
    }
    start = 'compress:\n  - layers: "*"\n    options: [keep]\n'
    message = assignment_error(tmp_path, start + '    exclude: ["*.up_proj"] #!\n')
    assert "compress[0].exclude[0]: '*.up_proj' matches none of the 4 layers" in message
    assert "nearest layer: " in message
    text = 'compress:\n  - layers: "*.q_proj" #!\n    options: [keep]\n    exclude: "*"\n'
    assert "exclude leaves none of the layers" in assignment_error(tmp_path, text)


def test_globs_mind_the_case_of_letters(tmp_path: Path) -> None:
    assert "nearest layer: model.embed_tokens" in assignment_error(
        tmp_path, "compress:\n  - layers: Model.Embed_Tokens #!\n    options: [keep]\n"
    )


def test_a_model_without_layers(tmp_path: Path) -> None:
    assert "none of the 0 layers" in assignment_error(
        tmp_path, 'compress:\n  - layers: "*" #!\n    options: [keep]\n', {}
    )


def test_a_glob_whose_layers_are_all_taken(tmp_path: Path) -> None:
    text = """\
compress:
  - layers: "model.*"
    options: [keep]
  - layers: "*.q_proj" #!
    options: [keep]
"""
    message = assignment_error(tmp_path, text)
    assert "every layer that '*.q_proj' matches (2) is taken by compress[0] on line 7" in message
    assert "the narrower glob first" in message


def test_a_group_size_that_does_not_divide_is_reported_at_its_option(tmp_path: Path) -> None:
    text = """\
compress:
  - layers: "model.layers.*"
    options:
      - keep
      - quantize: {bits: 4, group_size: 64} #!
"""
    message = assignment_error(tmp_path, text, reader="transformers")
    assert (
        "compress[0].options[1]: layer model.layers.0.down_proj: group_size=64 does not divide "
        "its 96 inputs" in message
    )
    assert "nearest that does: 48" in message and "target: curvprune" in message
    assert len(assign_options(load_recipe(tmp_path / "recipe.yaml"), LAYERS)) == 3, (
        "curvprune.load reads it"
    )


# ------------------------------------------------------------ layers that share an option

IN_A_BLOCK = (
    *("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj"),
)
FIRST = {f"model.layers.0.{name}": (64, 64) for name in IN_A_BLOCK}
BLOCKS = FIRST | {f"model.layers.1.{name}": (64, 64) for name in IN_A_BLOCK}


def grouped(folder: Path, text: str, layers: dict[str, tuple[int, int]] = BLOCKS) -> Groups:
    recipe = load_recipe(write(folder, MODEL + DATA + text + BUDGET))
    assert load_recipe(write(folder, lock_text(recipe, {}))) == recipe
    return assign_groups(recipe, layers, assign_options(recipe, layers))


def grouping_error(folder: Path, text: str) -> str:
    full = MODEL + DATA + text
    with pytest.raises(RecipeError) as caught:
        grouped(folder, text)
    assert caught.value.line == marked_line(full), str(caught.value)
    return str(caught.value)


def members(names: str) -> tuple[tuple[str, ...], ...]:
    """The same names in both blocks, in the model's order."""
    found = []
    for block in range(2):
        for group in names.split(","):
            found.append(tuple(f"model.layers.{block}.{name}" for name in group.split()))
    return tuple(found)


def test_fused_ties_query_key_value_and_gate_up_in_every_block(tmp_path: Path) -> None:
    fused = members("attn.q_proj attn.k_proj attn.v_proj, mlp.gate_proj mlp.up_proj")
    found = grouped(tmp_path, COMPRESS + "same_option: fused\n")
    assert found == Groups(layers=fused, notes=())
    globs = 'same_option:\n  - ["*.gate_proj", "*.up_*"]\n  - ["*.attn.[qkv]_proj"]\n'
    assert grouped(tmp_path, COMPRESS + globs) == found
    alone = (
        "same_option[1]: no other layer in the same parent module to share with: "
        "model.layers.0.attn.o_proj, model.layers.1.attn.o_proj"
    )
    mixed = grouped(tmp_path, COMPRESS + 'same_option: [fused, ["*.o_proj"]]\n')
    assert mixed == Groups(layers=fused, notes=(alone,))
    assert grouped(tmp_path, COMPRESS) == Groups(layers=(), notes=())


def test_fused_knows_the_names_of_other_families_and_says_so_where_it_knows_none(
    tmp_path: Path,
) -> None:
    names = [
        "bert.0.self.query",
        "bert.0.self.key",
        "bert.0.self.value",
        "t5.0.wi_0",
        "t5.0.wi_1",
        "mixtral.0.w1",
    ]
    names += ["mixtral.0.w2", "mixtral.0.w3", "gpt2.0.c_attn", "other.key"]
    text = """\
compress:
  - layers: "*"
    options: [keep, {quantize: {bits: 4}}]
same_option: fused
"""
    found = grouped(tmp_path, text, dict.fromkeys(names, (8, 8)))
    assert found.layers == (tuple(names[:3]), tuple(names[3:5]), ("mixtral.0.w1", "mixtral.0.w3"))
    assert grouped(tmp_path, text, {"a.c_attn": (8, 8)}).notes == (
        "same_option: no layers of this model have names that are known to be fused",
    )


def test_layers_that_have_no_choice_need_no_group(tmp_path: Path) -> None:
    one = 'compress:\n  - layers: "*"\n    options: [{quantize: {bits: 4}}]\nsame_option: fused\n'
    assert grouped(tmp_path, one).layers == ()
    kept = """\
compress:
  - layers: "*.o_proj"
    options: [keep, {quantize: {bits: 4}}]
same_option: fused
"""
    assert grouped(tmp_path, kept).layers == ()


def test_groups_that_cannot_be_have_a_line(tmp_path: Path) -> None:
    message = grouping_error(
        tmp_path, COMPRESS + 'same_option:\n  - - "*.q_proj"\n    - "*.qk_proj" #!\n'
    )
    assert (
        "same_option[0][1]: '*.qk_proj' matches none of the 12 layers; nearest layer: model.layers."
        in message
    )
    twice = 'same_option:\n  - fused\n  - ["*.v_proj", "*.o_proj"] #!\n'
    message = grouping_error(tmp_path, COMPRESS + twice)
    assert (
        "same_option[1]: layer model.layers.0.attn.v_proj is already in a group of same_option[0]"
        in message
    )
    fewer = """\
compress:
  - layers: "*.up_proj"
    options: [{quantize: {bits: 8}}, keep]
  - layers: "*.gate_proj"
    options: [{quantize: {bits: 8}}, {quantize: {bits: 4}}]
same_option: fused #!
"""
    message = grouping_error(tmp_path, fewer)
    assert (
        "layers model.layers.0.mlp.gate_proj and model.layers.0.mlp.up_proj must share an option"
        in message
    )
    assert "only model.layers.0.mlp.gate_proj is offered int4-pc-sym" in message
    assert "only model.layers.0.mlp.up_proj is offered keep; offer both the same options" in message
    left_out = (
        'compress:\n  - layers: ["*.q_proj", "*.k_proj"]\n    options: [{quantize: {bits: 8}}]\n'
    )
    message = grouping_error(tmp_path, left_out + "same_option: fused #!\n")
    assert "only model.layers.0.attn.v_proj is offered keep" in message
