"""What it takes to prepare a TFDS builder, in words; reading it afterwards takes nothing more.

As of tensorflow-datasets 4.9.10.
"""

from __future__ import annotations

_PLAIN_MODULES = {
    "glue": "tensorflow_datasets.text.glue",
    "squad": "tensorflow_datasets",
    "wmt14_translate": "tensorflow_datasets.translate.wmt14",
    "wmt16_translate": "tensorflow_datasets.translate.wmt16",
    "xnli": "tensorflow_datasets.text.xnli",
}
"""Builders that prepare without TensorFlow, and the module to import so that TFDS finds them."""

_BEAM = ("c4", "wikipedia")
_ARCHIVES = {"imagenet2012": ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")}


def how_to_prepare(name: str) -> str:
    """The end of a sentence for "glue/mnli", "wikipedia/20230601.en" or "c4:3.1.0".

    It says how to prepare the builder, with what installed, and by which command.
    """
    builder = name.split("/")[0].split(":")[0]
    if builder in _PLAIN_MODULES:
        modules = dict.fromkeys((_PLAIN_MODULES[builder], "tensorflow_datasets"))
        return (
            "this environment can prepare it, without TensorFlow: "
            f'`python -c "import {", ".join(modules)}; tensorflow_datasets.builder({name!r}, '
            "file_format='array_record').download_and_prepare()\"`"
        )
    command = f"`tfds build {name} --file_format=array_record`"
    extra = "install the extra 'prepare' in an environment of its own"
    if builder in _BEAM:
        return f"it needs TensorFlow and a Beam pipeline: {extra} and run {command} there"
    if builder in _ARCHIVES:
        archives = " and ".join(_ARCHIVES[builder])
        return (
            f"it needs TensorFlow, and {archives} in the folder downloads/manual of the TFDS "
            f"folder, for they cannot be downloaded without an account: {extra} and run {command} "
            "there"
        )
    return f"it may need TensorFlow: {extra} and run {command} there"
