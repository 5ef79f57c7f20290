"""Turns between requests and tuning: never more delay than the budget, and no waiting where nobody is expected."""

import math
import threading
import time
from contextlib import suppress

import pytest

from zoray.engines.shared.cost import RARE, SHARE, line
from zoray.engines.shared.throttle import DOUBT_SECONDS, TRAFFIC_SECONDS, Closed, Throttle
from zoray.records import ConfigError


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def busy(slowdown=1.5, first=0.2, step=0.1):
    """A throttle that has seen requests of known times, and slices of 10 ms + 1 ms a unit."""
    clock = Clock()
    throttle = Throttle(slowdown, clock)
    throttle.began()
    throttle.first_token(first)
    for _ in range(10):
        throttle.token(step)
    throttle.ended()
    for size in (10, 20, 40):
        throttle.took("tokens", size, 0.010 + 0.001 * size)
    return throttle, clock


def given(throttle, least=1.0, most=math.inf):
    """What a slice may do now; None where it has to wait."""
    found: list[float] = []

    def ask():
        with suppress(Closed):
            found.append(throttle.wait("tokens", least, most))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(0.3)
    return found[0] if found else None


def test_without_traffic_slices_are_as_large_as_they_want_to_be():
    clock = Clock()
    throttle = Throttle(1.5, clock)
    assert throttle.wait("tokens", 64, 2048) == 2048  # nothing is known yet
    throttle.took("tokens", 2048, 30.0)
    assert throttle.wait("tokens", 64, 2048) == 2048  # nobody waits for it
    assert throttle.wait("slots", 1, 3) == 3


def test_large_slices_do_not_hide_what_small_ones_cost():
    """Those of when nobody is expected are all of about one size, and what they say of smaller ones is noise."""
    throttle, clock = busy()
    clock.now += TRAFFIC_SECONDS + 1
    for k in range(200):
        throttle.took("tokens", 1000 + k % 7, 1.0 + 0.1 * (k % 3))
    throttle.began()
    throttle.ended()
    assert given(throttle) == pytest.approx((0.5 * 0.2 - 0.010) / 0.001, rel=0.1)


def test_between_requests_a_slice_takes_its_share_of_a_first_token():
    throttle, clock = busy()
    assert given(throttle) == pytest.approx((0.5 * 0.2 - 0.010) / 0.001)
    assert given(throttle, least=91.0) is None  # the smallest that there is would take longer
    throttle.close()
    throttle, clock = busy()
    clock.now += TRAFFIC_SECONDS + 1
    assert given(throttle, most=2048.0) == 2048


def test_during_requests_slices_are_shorter_and_have_a_small_share_together():
    throttle, clock = busy()
    throttle.began()
    assert given(throttle) is None  # there is no credit yet
    throttle.close()
    throttle, clock = busy()
    throttle.began()
    clock.now += 2.0
    size = given(throttle)
    assert size == pytest.approx((0.5 * 0.1 - 0.010) / 0.001)
    spent, began = 0.0, clock.now
    for _ in range(1000):
        clock.now += 0.05
        with throttle._changed:
            allowed, _ = throttle._allowed()
            found = throttle._size("tokens", allowed, 1.0)
        if found is not None:
            seconds = 0.010 + 0.001 * found
            assert seconds <= 0.5 * 0.1 + 1e-9
            throttle.took("tokens", found, seconds)
            spent += seconds
    assert 0.5 * SHARE < spent / (clock.now - began) <= SHARE + 0.01


def test_where_no_slowdown_is_allowed_tuning_waits_for_quiet():
    throttle, clock = busy(slowdown=1.0)
    assert given(throttle) is None
    throttle.close()
    throttle, clock = busy(slowdown=1.0)
    clock.now += TRAFFIC_SECONDS + 1
    assert given(throttle) is not None


def test_the_end_of_a_request_wakes_who_waits_and_so_does_the_end_of_all():
    throttle = Throttle(2.0)
    throttle.took("tokens", 1, 1e-4)
    throttle.began()
    results: list[object] = []

    def ask():
        try:
            results.append(throttle.wait("tokens", 1))
        except Closed:
            results.append(Closed)

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(2)]
    threads[0].start()
    time.sleep(0.1)
    assert not results and throttle.under_way == 1
    throttle.first_token(0.5)
    throttle.ended()
    threads[0].join(2)
    assert len(results) == 1 and isinstance(results[0], float) and throttle.waited > 0.05
    throttle.began()
    threads[1].start()
    throttle.close()
    threads[1].join(2)
    assert results[1] is Closed


def test_the_cost_of_a_slice_is_a_line_that_never_falls():
    assert line([(10, 0.02), (20, 0.03), (40, 0.05)]) == (pytest.approx(0.01), pytest.approx(0.001))
    assert line([(10, 0.02)]) == (0.0, pytest.approx(0.002))
    fixed, each = line([(10, 0.05), (40, 0.01)])  # noise: the longer one was faster
    assert each == 0 and fixed == pytest.approx(0.03)
    assert all(math.isfinite(value) for value in line([(0, 0.1), (0, 0.1)]))


def test_less_than_no_slowdown_is_refused():
    with pytest.raises(ConfigError, match="max_slowdown of at least 1"):
        Throttle(0.9)


def test_one_slow_slice_does_not_change_what_slices_cost():
    points = [(size, 0.010 + 0.001 * size) for size in (10, 20, 30, 40, 50)]
    assert line([*points, (10, 20.0)]) == (pytest.approx(0.010, abs=2e-3), pytest.approx(0.001, rel=0.2))


def test_a_cost_that_was_of_a_bad_moment_is_doubted_after_a_while():
    clock = Clock()
    throttle = Throttle(1.5, clock)
    throttle.began()
    throttle.first_token(0.2)
    throttle.ended()
    throttle.took("tokens", 64, 5.0)  # more than the 0.1 s that is allowed
    stands = threading.Event()

    def requests():  # there is traffic all the time
        while not stands.wait(0.02):
            clock.now += 2.0
            throttle.began()
            throttle.ended()

    thread = threading.Thread(target=requests, daemon=True)
    thread.start()
    try:
        assert throttle.wait("tokens", 64) == 64 and throttle.waited > DOUBT_SECONDS
    finally:
        stands.set()
        thread.join()
    throttle.took("tokens", 64, 0.01)
    assert throttle.wait("tokens", 64) == pytest.approx(640)


def test_what_slices_have_delayed_does_not_allow_longer_ones():
    throttle, clock = busy(first=0.2)
    for _ in range(100):  # each request finds a slice under way, and waits for its end
        allowed = throttle._allowed()[0]
        clock.now += allowed
        throttle.took("tokens", 1, allowed)
        throttle.began()
        clock.now += 0.2
        throttle.first_token(0.2 + allowed)
        throttle.ended()
    assert throttle._allowed()[0] == pytest.approx(0.5 * 0.2)


def test_one_gap_in_many_may_be_as_long_as_a_pause_allows():
    """Else what can't be split further, as a slot that is written, would never run during chats."""
    throttle, clock = busy(first=0.3)
    throttle.began()
    throttle.began()
    long = 0.010 + 0.001 * 80  # more than half of a step, less than half of a first token
    seen = []
    for _ in range(4 * RARE):
        clock.now += 0.1
        for _ in range(2):
            throttle.token(0.1)
        with throttle._changed:
            allowed = throttle._size("tokens", throttle._allowed()[0], 80.0) is not None
        seen.append(allowed)
        if allowed:
            throttle.took("tokens", 80, long)
    assert seen.index(True) >= RARE - 11 and sum(seen) in (3, 4)  # the throttle has seen ten steps before
    throttle, clock = busy(slowdown=1.0, first=0.3)
    throttle.began()
    for _ in range(4 * RARE):
        clock.now += 0.1
        throttle.token(0.1)
    assert throttle._allowed()[0] == 0
