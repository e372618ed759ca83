"""Prometheus' text format: its own parser reads what is written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families as read

from tpvpn.exposition import Histogram, by, family, histogram, single

TEXT = st.text('ab"\\\n\r\t {}=,#ü', max_size=8)


@given(st.dictionaries(TEXT, st.integers(0, 1 << 53) | st.floats(0, 1e15), max_size=5))
def test_what_is_written_is_read(values: dict[str, float]) -> None:
    (found,) = read(family("gauge", "of_things", "Things, by name.", by("name", values)))
    assert (found.name, found.type, found.documentation) == ("of_things", "gauge", "Things, by name.")
    assert {one.labels["name"]: one.value for one in found.samples} == values


def test_a_counter_without_labels() -> None:
    text = single("counter", "things_total", "All\nof\\them.", 7)
    assert text == "# HELP things_total All\\nof\\\\them.\n# TYPE things_total counter\nthings_total 7\n"
    (found,) = read(text)
    assert (found.name, found.documentation) == ("things", "All\nof\\them.")


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 99.0]), max_size=20))
def test_a_histogram_counts_up_to_each_bound(values: list[float]) -> None:
    counted = Histogram([0.5, 1, 2])
    for value in values:
        counted.observe(value)
    (found,) = read(histogram("lag_seconds", "Lag.", counted))
    samples = {(one.name, one.labels.get("le")): one.value for one in found.samples}
    for bound in ("0.5", "1", "2", "+Inf"):
        assert samples["lag_seconds_bucket", bound] == sum(value <= float(bound) for value in values)
    assert samples["lag_seconds_count", None] == len(values)
    assert samples["lag_seconds_sum", None] == pytest.approx(sum(values))
