"""The compilers accept the XLA flags of the launchers; an unknown flag would end every process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.multi_process, pytest.mark.slow]

LAUNCHERS = Path(__file__).parents[2] / "launch"
COMPILE = """
import jax
from jax.experimental import topologies
device = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2").devices[0]
there = jax.sharding.SingleDeviceSharding(device)
x = jax.ShapeDtypeStruct((8, 128), "float32", sharding=there)
jax.jit(lambda x: x @ x.T).lower(x).compile()
"""


def flags(kind):
    text = "".join(file.read_text() for file in LAUNCHERS.iterdir() if file.is_file())
    return sorted(set(re.findall(rf"--xla_{kind}_\w+=\w+", text)))


def compile_with(variable, value):
    own = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    return subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=os.environ | own | {variable: value},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(("variable", "kind"), [("LIBTPU_INIT_ARGS", "tpu"), ("XLA_FLAGS", "gpu")])
def test_the_compilers_accept_the_flags_of_the_launchers(variable, kind):
    assert flags(kind)
    good = compile_with(variable, " ".join(flags(kind)))
    assert good.returncode == 0, good.stderr
    bad = compile_with(variable, f"--xla_{kind}_no_such_flag=1")
    assert bad.returncode != 0
    assert re.search("Unknown .*flag.*no_such_flag", bad.stderr)
