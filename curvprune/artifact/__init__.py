"""Packing, saving and loading of compressed models; views of them for other readers."""

from curvprune.artifact.bytes_on_disk import (
    Portable,
    form_of,
    is_transformers,
    layer_bytes,
    portable_for,
    reader_of,
    why_not_portable,
)
from curvprune.artifact.dense import export_dense
from curvprune.artifact.folder import (
    WEIGHTS,
    coded_layers,
    folder_bytes,
    header_bytes,
    load_into,
    other_bytes,
    save,
    state_dict_on_disk,
    tensor_names,
    weights_file,
)
from curvprune.artifact.gptq import export_gptq
from curvprune.artifact.manifest import (
    MANIFEST,
    Manifest,
    is_own_card,
    not_written,
    read_manifest,
    verify,
    write_card,
)
from curvprune.artifact.one_by_one import ArtifactFile, Entry, opened_file
from curvprune.artifact.packed_modules import PackedWeight, SparseWeight
from curvprune.artifact.packing import pack, unpack
from curvprune.artifact.readers import readable
from curvprune.artifact.save_and_load import describe, load_artifact, unread_note, write_model
from curvprune.artifact.stored_layers import Stored, stored_tensors
from curvprune.artifact.transformers_folder import quantization_config

__all__ = [
    "MANIFEST",
    "WEIGHTS",
    "ArtifactFile",
    "Entry",
    "Manifest",
    "PackedWeight",
    "Portable",
    "SparseWeight",
    "Stored",
    "coded_layers",
    "describe",
    "export_dense",
    "export_gptq",
    "folder_bytes",
    "form_of",
    "header_bytes",
    "is_own_card",
    "is_transformers",
    "layer_bytes",
    "load_artifact",
    "load_into",
    "not_written",
    "opened_file",
    "other_bytes",
    "pack",
    "portable_for",
    "quantization_config",
    "read_manifest",
    "readable",
    "reader_of",
    "save",
    "state_dict_on_disk",
    "stored_tensors",
    "tensor_names",
    "unpack",
    "unread_note",
    "verify",
    "weights_file",
    "why_not_portable",
    "write_card",
    "write_model",
]
