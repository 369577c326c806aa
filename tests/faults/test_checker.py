"""The checker of the matrix finds what is wrong in ledgers that a test made up."""

from harness.checker import check
from harness.ledger import Ledger, read_ledgers

EVENTS = [("first", number) for number in range(100)]


def stats(accepted=100, delivered=100, **dropped):
    """Return the last counters of a publisher."""
    return {"accepted": accepted, "delivered": delivered, "dropped": dropped, "queue_events": 0, "spooled": 0}


def ledger(end=None, *, refused=()):
    """Return the lines of a producer that offered 100 events, of which 50 were on the disk for sure."""
    lines = [
        {"at": 1.0, "producer": "first", "offered": [0, 50], "refused": list(refused), "durable": True},
        {"at": 2.0, "producer": "first", "offered": [50, 100], "refused": [], "durable": False},
    ]
    if end is not None:
        lines.append({"at": 3.0, "producer": "first", "closed": {}, "stats": end})
    return lines


def test_a_row_without_faults():
    """All events arrived once and in order."""
    verdict = check(ledger(stats()), EVENTS)
    assert verdict == (100, 0, 0, 0, 0, 0, None, [])


def test_a_loss_is_found():
    """An event that neither arrived nor was counted is lost."""
    assert check(ledger(stats()), EVENTS[:-1]).lost == 1
    assert check(ledger(stats()), EVENTS[:10] + EVENTS[13:]).lost == 3


def listed(*numbers):
    """Return the line of the events in the dead letters."""
    return {"listed": [("first", number) for number in numbers]}


def returned(*numbers):
    """Return the line of a batch that the spool returned."""
    return {"at": 2.5, "returned": [("first", number) for number in numbers]}


def test_a_listed_loss_is_none():
    """An event that the publisher counted as dropped and listed is not lost; another one is."""
    lines = [*ledger(stats(delivered=99, rejected=1)), returned(*range(100)), listed(0)]
    verdict = check(lines, EVENTS[1:])
    assert (verdict.lost, verdict.counted, verdict.wrong) == (0, 1, [])
    assert check(lines, EVENTS[2:]).lost == 1


def test_a_count_does_not_hide_another_loss():
    """The number is right, but the event that is missing is not the one that was dropped."""
    lines = [*ledger(stats(delivered=99, rejected=1)), returned(*range(100)), listed(0)]
    assert check(lines, EVENTS[:-1]).lost == 1
    unlisted = check(lines[:-1], EVENTS[1:])
    assert (unlisted.lost, unlisted.wrong) == (1, ["dead letters"])


def test_a_loss_that_the_spool_counts_is_none():
    """Of what it did not return, the number has to be right; it says nothing of what was returned."""
    counted = ledger(stats(delivered=97, corrupt=3))
    verdict = check([*counted, returned(*range(3, 100))], EVENTS[3:])
    assert (verdict.lost, verdict.counted, verdict.wrong) == (0, 3, [])
    assert check([*counted, returned(*range(4, 100))], EVENTS[4:]).lost == 1
    elsewhere = check([*counted, returned(*range(100))], EVENTS[3:])
    assert (elsewhere.lost, elsewhere.wrong) == (3, ["spool"])
    too_many = check([*counted, returned(*range(2, 100))], EVENTS[2:])
    assert (too_many.lost, too_many.wrong) == (0, ["spool"])


def test_refused_events_are_not_expected():
    """A refused event was never accepted."""
    verdict = check(ledger(stats(accepted=98, delivered=98), refused=[3, 4]), EVENTS[:3] + EVENTS[5:])
    assert (verdict.accepted, verdict.lost, verdict.refused) == (98, 0, 2)


def test_a_killed_producer_owes_what_was_durable():
    """Of a producer that wrote no end, the events before its last durable one are due; others may arrive or not."""
    assert check(ledger(), EVENTS[:50])[:2] == (50, 0)
    assert check(ledger(), EVENTS)[:2] == (50, 0)
    assert check(ledger(), EVENTS[:49]).lost == 1


def test_a_double_is_found():
    """Each arrival after the first counts, and is no change of the order."""
    verdict = check(ledger(stats()), [*EVENTS, EVENTS[5], EVENTS[5]])
    assert (verdict.lost, verdict.doubled, verdict.reordered) == (0, 2, 0)


def test_a_reorder_is_found():
    """Each event counts that arrived after a later one of its own producer."""
    verdict = check(ledger(stats()), EVENTS[:10] + EVENTS[12:20] + EVENTS[10:12] + EVENTS[20:])
    assert (verdict.lost, verdict.doubled, verdict.reordered) == (0, 0, 2)
    others = [("second", number) for number in range(100)]
    mixed = [event for pair in zip(EVENTS, others, strict=True) for event in pair]
    assert check(ledger(stats()), mixed).reordered == 0


def test_counters_that_do_not_add_up_are_found():
    """The publisher is named."""
    assert check(ledger(stats(delivered=98)), EVENTS).wrong == ["first"]


def test_the_time_to_recover_is_that_of_the_next_delivery():
    """It is counted from the end of the last fault; None if nothing was delivered after it."""
    fault = [{"at": 4.0, "fault": "kill", "is_over": False}, {"at": 5.0, "fault": "kill", "is_over": True}]
    deliveries = [{"at": at, "producer": "first", "delivered": at} for at in (4.5, 5.25, 6.0)]
    lines = sorted(ledger(stats()) + fault + deliveries, key=lambda line: line["at"])
    assert check(lines, EVENTS).recovered == 0.25
    assert check(ledger(stats()) + fault, EVENTS).recovered is None


def test_ledgers_are_read_in_the_order_of_their_times(tmp_path):
    """Lines of several processes are one list."""
    first, second = Ledger(tmp_path / "first.ledger"), Ledger(tmp_path / "second.ledger")
    for number in range(6):
        (first, second)[number % 2].write(number=number)
    assert [line["number"] for line in read_ledgers(tmp_path)] == list(range(6))
