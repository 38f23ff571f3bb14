# SPDX-License-Identifier: Apache-2.0
from llm_trainer.common.retry import Backoff


def test_the_waits_double_up_to_the_longest_and_a_success_begins_anew():
    backoff = Backoff(2.0, 15.0)
    assert [backoff.note_failure() for _ in range(5)] == [2, 4, 8, 15, 15]
    assert backoff.num_failures == 5
    backoff.note_success()
    assert (backoff.num_failures, backoff.note_failure()) == (0, 2)


def test_a_failure_that_lasts_for_days_is_waited_for_as_the_longest():
    assert Backoff(2.0, 60.0, num_failures=10**6).note_failure() == 60
