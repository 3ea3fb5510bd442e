"""The short form of `python -m tests.faults texts`. Kills: test_train, test_checkpoint, test_interruptions."""

import faults
import pytest


@pytest.mark.parametrize("seed", range(2))
def test_graders_under_hostile_texts(seed):
    """Nothing is raised. Times are looked at by hand: here something else may be running."""
    assert not [fault for fault in faults.texts(200, seed) if "slower" not in fault]


def test_faults_are_found(monkeypatch):
    def stumble(problem, text, grader):
        if "numbers" in problem:
            raise ZeroDivisionError

    monkeypatch.setattr(faults.data, "is_correct", stumble)
    assert len([fault for fault in faults.texts(5) if "ZeroDivisionError" in fault]) == 5
