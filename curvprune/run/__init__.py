"""From a recipe or arguments to a certified model: task, stages, baselines, checks."""

from curvprune.run.baselines import controls, sensitive
from curvprune.run.clean import clean
from curvprune.run.layer_table import LayerRow, joined_names, layer_lines
from curvprune.run.models import TASKS, load_model, load_tokenizer, model_sha256, package_folder
from curvprune.run.pipeline import (
    Check,
    RunResult,
    analyze,
    check,
    prepare,
    rebuild_report,
    run,
)
from curvprune.run.recipe import Recipe, RecoverSection, load_recipe, lock_text
from curvprune.run.recipe_errors import RecipeError
from curvprune.run.recipe_layers import assign_groups, assign_options
from curvprune.run.selection import chance_at, select_plans
from curvprune.run.sequence import Tried, chance_of, expected_saving, next_plan, to_test
from curvprune.run.sources import (
    DIGITS_TRAINING,
    digits,
    digits_splits,
    hub_documents,
    python_docs,
    text_files,
    text_splits,
)
from curvprune.run.stages import (
    apply_plan,
    certify_plans,
    price_options,
    solve_options,
    spread_zeros,
    unpriced_plan,
)
from curvprune.run.task import Job, Settings, count_work, limit_plans

__all__ = [
    "DIGITS_TRAINING",
    "TASKS",
    "Check",
    "Job",
    "LayerRow",
    "Recipe",
    "RecipeError",
    "RecoverSection",
    "RunResult",
    "Settings",
    "Tried",
    "analyze",
    "apply_plan",
    "assign_groups",
    "assign_options",
    "certify_plans",
    "chance_at",
    "chance_of",
    "check",
    "clean",
    "controls",
    "count_work",
    "digits",
    "digits_splits",
    "expected_saving",
    "hub_documents",
    "joined_names",
    "layer_lines",
    "limit_plans",
    "load_model",
    "load_recipe",
    "load_tokenizer",
    "lock_text",
    "model_sha256",
    "next_plan",
    "package_folder",
    "prepare",
    "price_options",
    "python_docs",
    "rebuild_report",
    "run",
    "select_plans",
    "sensitive",
    "solve_options",
    "spread_zeros",
    "text_files",
    "text_splits",
    "to_test",
    "unpriced_plan",
]
