"""What the plugin says reaches people once: on stderr, or where the application wants it."""

import pytest
from launching import SCRIPTS, forked


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(
    ("engine", "when", "prefix"),
    [
        ("plain", "never", "spectral_ds"),
        ("deepspeed", "never", "spectral_ds"),
        ("plain", "after", "application"),
        ("deepspeed", "before", "application"),
    ],
)
def test_what_is_attached_and_the_verdict_are_said_once(engine, when, prefix):
    done = forked(1, SCRIPTS / "messages_loop.py", engine, when, runner=False)
    assert done.code == 0, done.stderr
    lines = done.stderr.splitlines()
    for words in ("24 nodes and", "this graph"):
        [line] = [line for line in lines if words in line]
        assert line.startswith(f"{prefix}: ")
