"""What the drill that kills workers makes of the starts that follow."""

from tools.kill_drill import Kill, note


def test_a_start_follows_every_kill_that_none_had_followed_yet():
    kills = [Kill(2, 9.0, None), Kill(2, 9.0, 10), Kill(1, 9.0, 10)]
    note(kills[:1], [None])  # it began from scratch
    note(kills[:2], [])  # it was killed before it began to train
    note(kills, [10])
    assert [(kill.resumed_step, kill.is_followed) for kill in kills] == [(None, True), (10, True), (10, True)]
    note(kills, [20])
    assert kills[2].resumed_step == 10
