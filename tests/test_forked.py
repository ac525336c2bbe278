"""What runs in a forked process starts like a new one, and none is waited for in vain."""

import signal

import forked
import pytest

pytestmark = pytest.mark.slow


def test_a_script_starts_with_nothing_of_the_last_one_and_nothing_of_sparsifai(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "assert __name__ == '__main__' and 'fastai' in sys.modules\n"
        "assert not any(name.partition('.')[0] == 'sparsifai' for name in sys.modules)\n"
        "import sparsifai\n"
        "print(os.getcwd(), sys.argv[1:], sparsifai.__file__, os.environ.get('OWN'))\n"
        "sys.exit('done')\n"
    )
    pytest.importorskip("fastai", reason="it is imported before forking where it is installed")
    first = forked.run(script, "one", folder=tmp_path, OWN="own")
    second = forked.run(script, folder=tmp_path)
    module = forked.ROOT / "sparsifai/__init__.py"
    assert first.stdout == f"{tmp_path} ['one'] {module} own\n"
    assert second.stdout == f"{tmp_path} [] {module} None\n"
    assert (first.returncode, first.stderr) == (1, "done\n")


def test_if_one_of_several_processes_fails_the_others_are_ended(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os, signal, sys\nsys.exit(3) if os.environ['RANK'] == '1' else signal.pause()\n")
    done = forked.run_together(script, folder=tmp_path, environments=[{"RANK": rank} for rank in "012"])
    assert [each.returncode for each in done] == [-signal.SIGTERM, 3, -signal.SIGTERM]
