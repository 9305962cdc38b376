"""From a recipe or arguments to a certified model: task, stages, baselines, checks."""

from curvprune.run.apply import applied_in, apply_plan
from curvprune.run.arguments import Arguments, Data, task_from, warn_caller
from curvprune.run.baselines import Control, controls, sensitive
from curvprune.run.certify import Shipped, apply_and_measure, certify_plans
from curvprune.run.clean import clean
from curvprune.run.comparison import rebuild_report
from curvprune.run.dry_run import Check, LimitNeed, check
from curvprune.run.evaluation import chance_at
from curvprune.run.layer_table import LayerRow, joined_names, layer_lines
from curvprune.run.models import TASKS, load_model, load_tokenizer, model_sha256, package_folder
from curvprune.run.pipeline import RunResult, analyze, choose_and_certify, run
from curvprune.run.power import Power
from curvprune.run.prepare import Prepared, Widths, prepare
from curvprune.run.price import PricedOptions, Prices, solve_and_price
from curvprune.run.recipe import Recipe, RecoverSection, load_recipe, lock_text
from curvprune.run.recipe_errors import RecipeError
from curvprune.run.recipe_layers import assign_groups, assign_options
from curvprune.run.results import Result, StructuredResult
from curvprune.run.select import Selection, clearly_less, select_plans
from curvprune.run.sequence import (
    Prospect,
    Tried,
    chance_of,
    expected_saving,
    fix_sequence,
    next_plan,
    to_test,
)
from curvprune.run.source_files import source_gguf
from curvprune.run.sources import (
    DIGITS_TRAINING,
    digits,
    digits_splits,
    documents_of,
    python_docs,
    text_splits,
)
from curvprune.run.task import Settings, Storage, Task, TaskError, check_task
from curvprune.run.two_models import ComparedModels, compare_folders
from curvprune.run.verbs import (
    allocate_zeros,
    compress_model,
    price_model,
    recover_model,
    recovery_splits,
    remove_units,
)
from curvprune.run.workspace import Workspace

__all__ = [
    "DIGITS_TRAINING",
    "TASKS",
    "Arguments",
    "Check",
    "ComparedModels",
    "Control",
    "Data",
    "LayerRow",
    "LimitNeed",
    "Power",
    "Prepared",
    "PricedOptions",
    "Prices",
    "Prospect",
    "Recipe",
    "RecipeError",
    "RecoverSection",
    "Result",
    "RunResult",
    "Selection",
    "Settings",
    "Shipped",
    "Storage",
    "StructuredResult",
    "Task",
    "TaskError",
    "Tried",
    "Widths",
    "Workspace",
    "allocate_zeros",
    "analyze",
    "applied_in",
    "apply_and_measure",
    "apply_plan",
    "assign_groups",
    "assign_options",
    "certify_plans",
    "chance_at",
    "chance_of",
    "check",
    "check_task",
    "choose_and_certify",
    "clean",
    "clearly_less",
    "compare_folders",
    "compress_model",
    "controls",
    "digits",
    "digits_splits",
    "documents_of",
    "expected_saving",
    "fix_sequence",
    "joined_names",
    "layer_lines",
    "load_model",
    "load_recipe",
    "load_tokenizer",
    "lock_text",
    "model_sha256",
    "next_plan",
    "package_folder",
    "prepare",
    "price_model",
    "python_docs",
    "rebuild_report",
    "recover_model",
    "recovery_splits",
    "remove_units",
    "run",
    "select_plans",
    "sensitive",
    "solve_and_price",
    "source_gguf",
    "task_from",
    "text_splits",
    "to_test",
    "warn_caller",
]
