"""What ``resume`` may be in Python."""

import pytest

from semtok.commands.run_recipe import resumes


@pytest.mark.parametrize("resume", ["nonsense", "yes", 1, None])
def test_resume_is_one_of_its_words(tmp_path, resume):
    with pytest.raises(ValueError, match="^resume: expected True, False or"):
        resumes(tmp_path, resume)
