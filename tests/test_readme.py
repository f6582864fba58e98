"""README's commands, on small data; those that launch several processes are in test_processes.py."""

import re
import shlex
import shutil

import forked
from conftest import needs_weights
from forked import ROOT

# Their options are tested in files of their own, on these the data are made, fetched, or measured.
ELSEWHERE = {"prepare_data.py", "prepare_data.py --source CIFAR10 --classes cat dog bird --out data-cifar"}
ELSEWHERE |= {"profile_models.py --epochs 1 3", "profile_models.py --data-dir data-vehicles --out report-vehicles"}
INSTALL = "pip install -r requirements.txt && python "  # and the first training


@needs_weights
def test_the_homework_is_done_by_the_commands_of_readme(workdir):
    shutil.make_archive(workdir / "vehicles", "zip", workdir / "data")
    text = (ROOT / "README.md").read_text()
    commands = re.findall(rf"(?:^    python |{re.escape(INSTALL)})(.*?) *(?:#.*)?$", text, re.M)
    assert commands[0] == "train_cnn.py --epochs 10"
    assert set(commands) > ELSEWHERE
    for command in commands:
        if command not in ELSEWHERE:
            done = forked.run(*shlex.split(command), cwd=workdir)
            assert done.returncode == 0, (command, done.stderr)
    for report in "report", "report-vehicles":
        pictures = {path.stem for path in (workdir / report).glob("*.png")}
        assert {"confusion", "learning-curves", "augmentation", "mistakes-2"} <= pictures
