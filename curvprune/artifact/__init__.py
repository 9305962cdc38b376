"""Packing, saving and loading of compressed models; views of them for other readers."""

from curvprune.artifact.export import export_dense, export_gptq
from curvprune.artifact.folder import (
    MANIFEST,
    WEIGHTS,
    Portable,
    folder_bytes,
    form_of,
    header_bytes,
    is_portable,
    is_transformers,
    layer_bytes,
    load_into,
    other_bytes,
    portable_for,
    reader_of,
    save,
    state_dict_on_disk,
    stored_tensors,
    tensor_names,
    weights_file,
)
from curvprune.artifact.packed_modules import PackedWeight, SparseWeight
from curvprune.artifact.save_and_load import describe, load_artifact, write_model
from curvprune.artifact.transformers_folder import loads_packed, quantization_config

__all__ = [
    "MANIFEST",
    "WEIGHTS",
    "PackedWeight",
    "Portable",
    "SparseWeight",
    "describe",
    "export_dense",
    "export_gptq",
    "folder_bytes",
    "form_of",
    "header_bytes",
    "is_portable",
    "is_transformers",
    "layer_bytes",
    "load_artifact",
    "load_into",
    "loads_packed",
    "other_bytes",
    "portable_for",
    "quantization_config",
    "reader_of",
    "save",
    "state_dict_on_disk",
    "stored_tensors",
    "tensor_names",
    "weights_file",
    "write_model",
]
