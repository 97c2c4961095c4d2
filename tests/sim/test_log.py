"""Both forms of what a run writes down, the interpreted and the compiled one, against a list of tuples."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from forms import read
from hypothesis import given
from hypothesis import strategies as st

import kit.native.log
import kit.sim.log

FORMS = [read("sim/log.py"), kit.native.log]
both = pytest.mark.parametrize("form", [*FORMS, kit.sim.log], ids=["list", "packed", "in use"])
times = st.floats(0, 1e12)
numbers = st.one_of(times, st.integers(-1, 2**53))


@both
@given(data=st.data())
def test_spans(form: ModuleType, data: st.DataObject) -> None:
    log, model = form.Log(), []
    for _ in range(data.draw(st.integers(0, 20))):
        what = data.draw(st.sampled_from(["add", "close", "leave", "write"]))
        if what == "leave":
            count = data.draw(st.integers(0, 3))
            log.leave(count)
            model += [[0.0, 0.0, 0, 0] for _ in range(count)]
            continue
        row = [data.draw(times), data.draw(times), data.draw(st.integers(0, 2**40)), data.draw(st.integers(-4, 2**40))]
        if what == "add":
            assert log.add(*row) == len(model) << form.SHIFT
            model.append(row)
        elif model:
            at = data.draw(st.integers(0, len(model) - 1))
            if what == "close":
                assert log.close(at << form.SHIFT, row[0]) == model[at][form.PARENT]
                model[at][form.END] = row[0]
            else:
                log.write(at << form.SHIFT, *row)
                model[at] = row
        assert len(log) == len(model) << form.SHIFT
    for which in (form.END, form.START, form.KEY, form.PARENT):
        column = log.column(which)
        assert column.dtype == np.float64
        assert column.tolist() == [row[which] for row in model]


@both
def test_a_column_that_was_read_stays_as_it_was(form: ModuleType) -> None:
    log = form.Log()
    at = log.add(1.0, 1.0, 7, -1)
    column = log.column(form.END)
    log.close(at, 5.0)
    for _ in range(1000):
        log.add(9.0, 9.0, 7, at)
    assert column.tolist() == [1.0]
    assert log.column(form.END).tolist() == [5.0, *[9.0] * 1000]


@both
def test_a_long_log_is_a_short_one_many_times(form: ModuleType) -> None:
    log, rows, count = form.Log(), form.Rows(), 40_000
    for at in range(0, count, 2):
        assert log.add(at, at, at, at - 1) == at << form.SHIFT
        log.leave(1)
        rows.add(*range(at, at + form.WIDTH))
    for at in range(0, count, 2):
        assert log.close(at << form.SHIFT, -at) == at - 1
        log.write(at + 1 << form.SHIFT, -at - 1, at + 1, at + 1, at)
    assert (log.column(form.END) == -np.arange(count)).all()
    assert (log.column(form.KEY) == np.arange(count)).all() and (log.column(form.PARENT) == np.arange(count) - 1).all()
    assert len(rows) == count // 2
    assert (rows.array() == np.arange(0, count, 2)[:, None] + np.arange(form.WIDTH)).all()


@both
@given(data=st.data())
def test_rows(form: ModuleType, data: st.DataObject) -> None:
    rows, model = form.Rows(), []
    for _ in range(data.draw(st.integers(0, 20))):
        what = data.draw(st.sampled_from(["add", "add", "read", "put"]))
        if what == "add":
            row = [data.draw(numbers) for _ in range(form.WIDTH)]
            rows.add(*row)
            model.append(row)
        elif what == "put":
            model = [[float(data.draw(times))] * form.WIDTH for _ in range(data.draw(st.integers(0, 3)))]
            rows.put(np.array(model).reshape(-1, form.WIDTH))
        else:
            assert rows.array().tolist() == model
        assert len(rows) == len(model)
    assert rows.array().shape == (len(model), form.WIDTH)
    assert rows.array().tolist() == model


def test_both_forms_offer_the_same() -> None:
    one, other = FORMS
    assert one.__all__ == other.__all__
    assert [getattr(one, name) for name in one.__all__ if name.isupper()] == [
        getattr(other, name) for name in other.__all__ if name.isupper()
    ]
    for name in ("Log", "Rows"):
        faces = [{m for m in vars(getattr(form, name)) if not m.startswith("_") and m.islower()} for form in FORMS]
        assert faces[0] == faces[1] != set()
