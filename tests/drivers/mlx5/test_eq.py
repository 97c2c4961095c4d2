"""Event queue and commands: nothing is lost, nothing is overwritten, a dead device says so."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from drivers.mlx5.rig import Pair

from kit.drivers.mlx5.core.cmd import (
    create_mkey_cb,
    mlx5_core_create_mkey,
    mlx5_core_destroy_mkey,
    mlx5_core_query_mkey,
)
from kit.drivers.mlx5.core.eq import (
    EqParam,
    mlx5_eq_create_generic,
    mlx5_eq_destroy_generic,
    mlx5_eq_disable,
    mlx5_eq_enable,
    mlx5_eq_get_eqe,
    mlx5_eq_update_cc,
    mlx5_eq_update_ci,
)  # fmt: skip
from kit.drivers.mlx5.descriptors import Mkc, PageFaultEqe, SendWr, Sge
from kit.drivers.mlx5.enums import KLM, PAGE, AccessMode, PageFaultSubtype, WcStatus, WrOpcode
from kit.drivers.mlx5.verbs_post import post_send, wait_cq
from kit.errors import Errno


def queue(nent=0x1000):
    pair = Pair()
    hca = pair.left.hca
    eq = pair.run(mlx5_eq_create_generic(hca, pair.thread, EqParam(nent)))
    assert hca.pf_eq is eq
    return pair, hca, eq


def test_the_ring_has_the_documented_size_and_spans():
    pair, hca, eq = queue()
    assert eq.size == 8192 and len(eq.ring) == 8192
    for name in (
        "create_async_eq",
        "create_map_eq",
        "mlx5_frag_buf_alloc_node",
        "init_eq_buf",
        "mlx5_cmd_exec",
        "mlx5_debug_eq_add",
    ):
        assert name in pair.engine.trace.steps.words
    assert pair.run(mlx5_eq_destroy_generic(hca, pair.thread, eq)) == 0 and hca.pf_eq is None and eq.eqn not in hca.eqs
    hca.fail_eq_buffer = True
    assert pair.run(mlx5_eq_create_generic(hca, pair.thread, EqParam())) == -errno.ENOMEM


def test_a_full_ring_stalls_faults_and_loses_none():
    pair, hca, eq = queue(nent=1)
    size = eq.size
    assert size == 256
    calls = []
    mlx5_eq_enable(hca, pair.thread, eq, lambda thread: calls.append(thread.now))
    for token in range(3 * size):
        eq.write(PageFaultEqe(PageFaultSubtype.WQE, token=token))
    pair.engine.run()
    assert eq.depth == size and eq.stalled == 2 * size and len(calls) == 1  # disarmed by the first
    seen = []
    while True:
        cc = 0
        while (eqe := mlx5_eq_get_eqe(eq, pair.thread, cc)) is not None:
            seen.append(eqe.token)
            cc = mlx5_eq_update_cc(eq, pair.thread, cc + 1)
            assert cc < 0x80
        if eq.prod_index == eq.cons_index + cc and not eq.stalled:
            break
    assert seen == list(range(3 * size)) and eq.doorbell_ci == 3 * size
    mlx5_eq_update_ci(eq, pair.thread, cc, True)
    pair.engine.run()
    assert eq.depth == 0 and len(calls) == 1 and eq.armed
    eq.write(PageFaultEqe(PageFaultSubtype.RDMA))
    pair.engine.run()
    assert len(calls) == 2


def test_arming_a_queue_that_holds_entries_interrupts_at_once_and_disable_silences_it():
    pair, hca, eq = queue(nent=1)
    calls = []
    eq.write(PageFaultEqe(PageFaultSubtype.WQE))
    mlx5_eq_enable(hca, pair.thread, eq, lambda thread: calls.append(thread.name))
    pair.engine.run()
    assert calls == [f"{hca.name} irq"]
    mlx5_eq_disable(hca, pair.thread, eq)
    mlx5_eq_update_ci(eq, pair.thread, 0, True)
    pair.engine.run()
    assert len(calls) == 1


def test_commands_cost_time_and_fail_on_a_dead_device():
    pair = Pair()
    hca = pair.left.hca
    begin = pair.engine.now
    mkc = Mkc(access_mode=AccessMode.KSM, translations_octword_size=8, mkey_7_0=0x5A)
    key = pair.run(mlx5_core_create_mkey(hca, pair.thread, mkc, True, np.array([(0, 7, 1 << 30)], KLM)))
    assert pair.engine.now - begin == 20.0 and key & 0xFF == 0x5A and key >> 8 in hca.mkeys.mkeys
    out = pair.run(mlx5_core_query_mkey(hca, pair.thread, key))
    assert out.klms[0].tolist() == (0, 7, 1 << 30) and out.mkc.access_mode == AccessMode.KSM
    got = []
    create_mkey_cb(hca, pair.thread, Mkc(), False, lambda thread, result: got.append((thread.now, result)))
    assert not got
    pair.engine.run()
    assert got[0][0] == pytest.approx(begin + 40) and got[0][1] >> 8 in hca.mkeys.mkeys
    assert pair.run(mlx5_core_destroy_mkey(hca, pair.thread, key)) == 0
    assert pair.run(mlx5_core_destroy_mkey(hca, pair.thread, key)) == -errno.EINVAL
    hca.internal_error = True
    for result in (
        pair.run(mlx5_core_create_mkey(hca, pair.thread, mkc)), pair.run(mlx5_core_query_mkey(hca, pair.thread, key)),
        pair.run(hca.page_fault_resume(pair.thread, 0, 1, 1, 0)),
    ):  # fmt: skip
        assert isinstance(result, Errno) and result == -errno.EIO
    create_mkey_cb(hca, pair.thread, Mkc(), False, lambda thread, result: got.append(result))
    pair.engine.run()
    assert got[-1] == -errno.EIO


def test_without_an_event_queue_a_missing_page_is_an_error():
    pair = Pair()
    pair.run(mlx5_eq_destroy_generic(pair.left.hca, pair.thread, pair.left.eq))
    qp, _ = pair.rc()
    src = pair.left.region(1, missing=True)
    pair.run(post_send(qp, pair.thread, SendWr(1, WrOpcode.SEND, (Sge(src.va, PAGE, src.key),))))
    assert pair.run(wait_cq(qp.send_cq, pair.thread))[0].status == WcStatus.LOC_PROT_ERR


def test_resuming_nothing_is_refused():
    pair = Pair()
    assert pair.run(pair.left.hca.page_fault_resume(pair.thread, 0, 99, 1, 0)) == -errno.EINVAL
    assert pair.left.hca.counters.unknown_resumes == 1
