"""Flows over mlx5 against closed forms: what each scenario must count, worked out from the documents' constants.

The forms use pages of 4 KiB, 8 translations or 4 KSM slots in 64 bytes, at most 1,048,512 bytes of them in a work
request, and children of 1 GiB.
"""

from __future__ import annotations

import re
from functools import cache

import pytest

import kit
from kit.errors import ParameterError
from kit.flows.registry import load_scenario
from kit.flows.run import Run
from kit.report.figures.window import COLUMN

CHUNK = (1 << 20) - 64  # MLX5_MAX_UMR_CHUNK


@cache
def ran(flow: str, scenario: str) -> Run:
    return kit.run(flow, scenario=scenario)


def metrics(flow: str, scenario: str) -> dict[str, float]:
    return ran(flow, scenario).metrics


def wqes(entries: int, size: int) -> int:
    """UMR work requests for so many translations of `size` bytes."""
    return -(-entries * size // CHUNK)


KSM = wqes(1 << 17, 16)  # an implicit parent: every slot empty
CHILD = wqes(1 << 18, 8)  # a child: every translation empty
REVOKE = 1
PINNED_BUFFER = 1  # the requester's own registration


def test_the_constants_give_the_documented_numbers_of_work_requests() -> None:
    assert (KSM, CHILD) == (3, 3)
    assert wqes(1024, 8) == 1


# -- implicit regions


def implicit_wqes(children: int, faults: int, slot_updates: int, zaps: int, freed: int) -> int:
    """Parent, children, one work request a fault and one for each update of the parent's slots, and their end.

    A child that is freed costs two more: its slot is emptied, its key revoked. The parent's key is revoked too.
    """
    return PINNED_BUFFER + KSM + children * CHILD + faults + slot_updates + zaps + freed * 2 + REVOKE


def test_the_worked_trace_of_the_documents_count_by_count() -> None:
    run = ran("mlx5_implicit_mr", "worked_trace")
    m = run.metrics
    assert m["ksm_entries"] == 131_072 and m["child_bytes"] == 1 << 30
    # 1, 3: the parent's key and the child's; 2: one event, for the whole of the operation
    assert m["create_mkey_commands"] == 2 and m["eqes"] == m["resumes"] == m["interrupts"] == 1
    assert m["children_created"] == m["children_destroyed"] == 1
    # 4: two pages in one walk; 5: two pages counted at the parent
    assert m["hmm_walks"] == 1 and m["implicit_page_faults"] == 2
    # 6: one callback for MADV_DONTNEED; 7: the parent's key is revoked
    assert m["invalidations"] == 1
    assert m["umr_wqes"] == implicit_wqes(children=1, faults=1, slot_updates=1, zaps=1, freed=1)
    assert m["resumes_in_error"] == m["stale_dma"] == 0
    assert run.trace.residency_at(m["simulated_us"], (5 << 30) // 4096, 4).tolist() == [0, 0, 0, 0]


def test_a_child_counts_its_own_invalidations_with_the_bug_and_without() -> None:
    from kit.flows.mlx5_implicit_mr.flow import FLOW

    for count, expected in (("bug", 1 + 2), ("fixed", 2)):
        session = FLOW.open(FLOW.Parameters.check({"rounds": 1, "count_invalidations": count}))
        session.open_device().register().rdma_write()
        child = session.mr.implicit_children[5]
        session.page_out()
        assert child.odp_stats.invalidations == expected, count


def test_eight_gigabytes_are_eight_children_and_every_message_one_fault() -> None:
    m, s = metrics("mlx5_implicit_mr", "eight_gigabytes"), load_scenario("mlx5_implicit_mr", "eight_gigabytes")
    per_round = s["areas"] * s["touch_pages"] * 4096 // s["message_bytes"]
    assert m["messages"] == 2 * per_round
    assert m["faults"] == m["eqes"] == m["resumes"] == m["hmm_walks"] == 2 * per_round
    assert m["implicit_page_faults"] == 2 * s["areas"] * s["touch_pages"]
    assert m["children_created"] == 2 * s["areas"] and m["children_destroyed"] == s["areas"]
    wanted = implicit_wqes(2 * s["areas"], 2 * per_round, 2 * s["areas"], zaps=s["areas"], freed=s["areas"])
    # the children of the second round are revoked with their parent
    assert m["umr_wqes"] == wanted + s["areas"] * REVOKE


def test_a_message_over_a_border_makes_two_children_in_one_fault() -> None:
    m = metrics("mlx5_implicit_mr", "across_a_gigabyte")
    assert m["faults"] == 2 and m["children_created"] == 4 and m["hmm_walks"] == 4
    assert m["implicit_page_faults"] == 2 * 16
    # two children, two walks, one update of both slots a round; the border splits MADV_DONTNEED into two callbacks
    assert m["invalidations"] == 2
    assert m["umr_wqes"] == implicit_wqes(4, faults=4, slot_updates=2, zaps=2, freed=2) + 2 * REVOKE


def test_pages_of_the_cpu_save_the_cpu_its_faults_and_nothing_else() -> None:
    m = metrics("mlx5_implicit_mr", "resident")
    assert m["faults"] == 2 * 16 and m["implicit_page_faults"] == 2 * 256


def test_a_reclaimed_page_comes_back_from_swap_with_its_content() -> None:
    m = metrics("mlx5_implicit_mr", "reclaimed")
    assert m["lost_pages"] == 0 and m["pages_checked"] == 256
    # every other page goes, so each of the 16 messages of the second round faults, for all of its 16 pages
    assert m["faults"] == 2 * 16 and m["implicit_page_faults"] == 2 * 256
    assert m["bytes_moved"] == 128 * 4096  # to swap; what comes back comes from nowhere that is memory


def test_nothing_is_lost_while_pages_are_thrown_away_under_messages() -> None:
    m = metrics("mlx5_implicit_mr", "racing")
    assert m["messages"] == 4 * 4 * 16 and m["lost_pages"] == m["stale_dma"] == m["resumes_in_error"] == 0
    assert m["children_created"] >= 4 and m["resumes"] == m["eqes"]
    assert m["hmm_walks"] >= m["faults"]


def test_an_event_without_the_length_brings_a_packet_and_looks_ahead_as_far_as_the_message_had_come() -> None:
    known = kit.run("mlx5_implicit_mr", scenario="length_unknown", op_len_known=True, rounds=1, page_out="none").metrics
    blind = kit.run("mlx5_implicit_mr", scenario="length_unknown", rounds=1, page_out="none").metrics
    assert known["faults"] == 1 and known["implicit_page_faults"] == 16
    assert blind["faults"] > known["faults"] and blind["lost_pages"] == 0


def test_sixty_four_faults_at_once_wait_for_four_workers() -> None:
    run = ran("mlx5_implicit_mr", "many_queue_pairs")
    m = run.metrics
    assert m["faults"] == m["messages"] == m["children_created"] == 64
    workers = {name for name in run.trace.actors.words if name.startswith("responder mlx5_ib_page_fault/")}
    assert len(workers) == 4
    assert m["umr_wqes"] == 64 * PINNED_BUFFER + KSM + 64 * (CHILD + 2) + 65 * REVOKE


def test_without_fault_objects_the_events_stay_in_the_queue_until_the_reserve_is_refilled() -> None:
    run = ran("mlx5_implicit_mr", "no_fault_objects")
    assert {"mlx5_ib_eq_pf_action", "mempool_refill"} <= set(run.conformance.steps_reached)
    assert run.metrics["resumes"] == run.metrics["eqes"] and run.metrics["resumes_in_error"] == 0


@pytest.mark.parametrize(("scenario", "errors"), [("unmapped", 1), ("umr_error", 2), ("dead_owner", 1)])
def test_what_cannot_be_served_is_resumed_with_an_error_and_said(scenario: str, errors: int) -> None:
    run = ran("mlx5_implicit_mr", scenario)
    assert run.metrics["resumes_in_error"] == 1
    assert len(run.errors) == errors and "REM_ACCESS_ERR" in run.errors[0]
    assert run.metrics["lost_pages"] == 0


# -- three kinds of regions side by side

PAGES = 1024  # of each buffer in the default scenario


def test_what_each_kind_of_region_holds() -> None:
    m = metrics("mlx5_odp_mr", "default")
    assert m["pinned_pinned_bytes"] == PAGES * 4096 and m["pinned_lists_bytes"] == 0
    assert m["explicit_pinned_bytes"] == 0 and m["explicit_lists_bytes"] == PAGES * (8 + 8)
    assert m["implicit_pinned_bytes"] == m["implicit_lists_bytes"] == 0
    assert m["pinned_resident_after_bytes"] == PAGES * 4096
    assert m["explicit_resident_after_bytes"] == m["implicit_resident_after_bytes"] == 0
    assert m["pinned_now_bytes"] == 0


def test_faults_of_a_message_of_four_mebibytes() -> None:
    m = metrics("mlx5_odp_mr", "default")
    # two touches of two regions on demand, each one fault, one walk; and the explicit registration's look at the table
    assert m["faults"] == 4 and m["hmm_walks"] == 4 + 1
    assert m["explicit_page_faults"] == m["implicit_page_faults"] == 2 * PAGES
    assert m["explicit_page_invalidations"] == PAGES * (PAGES + 1) // 2  # the counting bug of that kernel
    pinned = 1 + REVOKE
    explicit = 1 + 2 * 1 + 1 + REVOKE
    implicit = KSM + 2 * (CHILD + 1 + 1) + 1 + 2 + REVOKE + REVOKE
    assert m["umr_wqes"] == PINNED_BUFFER + pinned + explicit + implicit


def test_the_fixed_counter_counts_a_page_once() -> None:
    m = kit.run("mlx5_odp_mr", kind="explicit", count_invalidations="fixed").metrics
    assert m["explicit_page_invalidations"] == PAGES


def test_registration_after_the_first_touch_finds_everything() -> None:
    m = metrics("mlx5_odp_mr", "resident")
    assert m["explicit_page_faults"] == 0 and m["faults"] == 1, "only the implicit region faults"
    assert m["implicit_page_faults"] == PAGES


@pytest.mark.parametrize(
    ("scenario", "prefetched", "faults"),
    [("prefetched", PAGES, 0), ("prefetched_read_only", 256, 16 * 2), ("prefetched_without_faults", 256, 16 * 2)],
)
def test_prefetch_counts_pages_and_what_it_brought_does_not_fault(scenario: str, prefetched: int, faults: int) -> None:
    m = metrics("mlx5_odp_mr", scenario)
    assert m["explicit_page_prefetch"] == m["implicit_page_prefetch"] == prefetched
    assert m["faults"] == faults


def test_a_background_prefetch_is_counted_when_it_is_done() -> None:
    m = metrics("mlx5_odp_mr", "prefetched_in_background")
    assert m["explicit_page_prefetch"] == m["implicit_page_prefetch"] == PAGES
    assert m["explicit_prefetch_us"] < metrics("mlx5_odp_mr", "prefetched")["explicit_prefetch_us"]


def test_one_translation_for_a_huge_page() -> None:
    m = metrics("mlx5_odp_mr", "hugetlb")
    assert m["explicit_lists_bytes"] == 2048 * 8 + 4 * 8
    assert m["explicit_page_faults"] == 2048 and m["faults"] == 4 + 0


def test_the_lock_limit_refuses_pinned_memory_only() -> None:
    run = ran("mlx5_odp_mr", "memory_lock_limit")
    assert len(run.errors) == 1 and "-ENOMEM from ib_umem_get" in run.errors[0]
    assert run.metrics["regions"] == 2 and run.metrics["pinned_pinned_bytes"] == 0


def test_a_region_larger_than_any_cached_key_gets_one_of_its_own() -> None:
    run = ran("mlx5_odp_mr", "larger_than_the_cache")
    assert {"reg_create", "mlx5_ib_create_mkey"} <= set(run.conformance.steps_reached)
    entries = (17 << 30) // 4096
    messages = int(run.metrics["messages"])
    assert run.metrics["umr_wqes"] == PINNED_BUFFER + wqes(entries, 8) + messages + REVOKE


# -- published numbers, each within 15 %


@pytest.mark.parametrize(
    ("scenario", "metric", "published"),
    [
        ("minor_fault_4_kib", "fault_mean_us", 220.0),
        ("minor_fault_4_mib", "fault_mean_us", 350.0),
        ("deregister_10000", "explicit_deregister_us", 95e3),
        ("deregister_10000_srcu", "explicit_deregister_us", 19.6e6),
        ("deregister_10000_pinned", "pinned_deregister_us", 172e3),
    ],
)
def test_published_times(scenario: str, metric: str, published: float) -> None:
    found = kit.run("mlx5_odp_mr", scenario=scenario).metrics[metric]
    assert abs(found - published) / published < 0.15, found


# -- rc_pingpong


@pytest.mark.parametrize(
    ("scenario", "client", "server", "naks"),
    [("odp", 0, 0, False), ("iodp", 1, 1, True), ("iodp_prefetch", 0, 0, False), ("inline", 1, 1, True)],
)
def test_how_often_each_side_faults(scenario: str, client: int, server: int, naks: bool) -> None:
    m = metrics("rc_pingpong", scenario)
    assert m["round_trips"] == 1000 and m["messages"] == 2000
    assert (m["client_page_faults"], m["server_page_faults"]) == (client, server)
    assert m["faults"] == client + server and bool(m["rnr_naks"]) is naks


def test_an_implicit_side_makes_one_child_and_one_update_of_its_slot() -> None:
    m = metrics("rc_pingpong", "iodp")
    assert m["children_created"] == 2
    assert m["umr_wqes"] == 2 * (KSM + CHILD + 1 + 1 + REVOKE + REVOKE)


def test_the_count_of_the_commit_that_shows_half_a_gigabyte() -> None:
    m = metrics("rc_pingpong", "half_a_gigabyte")
    assert m["client_page_prefetch"] == m["server_page_prefetch"] == -(-500_000_000 // 4096) == 122_071


def test_memory_pressure_costs_one_fault_each_time() -> None:
    m = metrics("rc_pingpong", "reclaimed")
    assert m["faults"] == 1000 // 100 and m["server_page_faults"] == 10 * 16 and m["lost_pages"] == 0


# -- RDMA follows migration


def test_every_page_goes_to_the_gpu_and_comes_home() -> None:
    m = metrics("rdma_follows_migration", "default")
    pages, rounds, messages = 16, 2, 4
    assert m["pages_moved"] == rounds * pages and m["pages_that_stayed"] == 0
    assert m["faults"] == rounds * messages and m["explicit_page_faults"] == rounds * pages
    assert m["bytes_moved"] == 2 * rounds * pages * 4096
    assert m["lost_pages"] == m["stale_dma"] == 0


def test_a_file_systems_pages_are_found_where_they_are_now() -> None:
    m = metrics("rdma_follows_migration", "file_system")
    assert m["pages_moved"] == 32 and m["explicit_page_faults"] == 32 and m["lost_pages"] == 0


@pytest.mark.parametrize("scenario", ["gpu_during", "file_system_during"])
def test_nothing_is_lost_while_pages_move_under_messages(scenario: str) -> None:
    m = metrics("rdma_follows_migration", scenario)
    assert m["pages_moved"] > 0 and m["lost_pages"] == m["stale_dma"] == m["resumes_in_error"] == 0


def test_one_fault_after_each_move_maps_all_of_a_dma_buf() -> None:
    """Moves: a request that empties the entries; faults: one that writes them. The rest: 3 regions made, 2 revoked."""
    m = metrics("rdma_follows_migration", "dma_buf")
    pages, rounds = 16, 4
    assert m["pages_moved"] == rounds * pages and m["faults"] == m["invalidations"] == rounds
    assert m["umr_wqes"] == 2 * rounds + 3 + 2 and m["bytes_moved"] == rounds * pages * 4096
    assert m["lost_pages"] == m["stale_dma"] == m["resumes_in_error"] == 0
    assert m["cpu_faults"] == 4 + 1, "the requester's buffer; the responder's CPU never touches the GPU's"


def test_without_peer_to_peer_each_mapping_brings_the_buffer_to_host_memory() -> None:
    """The registration, and one fault after each of the moves back to the GPU; the importer hears of every move."""
    m = metrics("rdma_follows_migration", "dma_buf_no_peer")
    assert m["faults"] == 2 and m["pages_moved"] == 2 * 16 and m["bytes_moved"] == (1 + 2 + 2) * 65536
    assert m["invalidations"] == 1 + 2 + 2 and m["umr_wqes"] == 2 * 2 + 3 + 2, (
        "only a mapped buffer has entries to empty"
    )
    assert m["lost_pages"] == m["stale_dma"] == 0


def test_a_dma_buf_that_moves_under_messages_loses_nothing() -> None:
    m = metrics("rdma_follows_migration", "dma_buf_during")
    assert m["pages_moved"] == 4 * 256 and m["invalidations"] == 4 <= m["faults"]
    assert m["lost_pages"] == m["stale_dma"] == m["resumes_in_error"] == 0


@pytest.mark.parametrize("era", ["mid", "new"])
@pytest.mark.parametrize("scenario", ["dma_buf", "dma_buf_no_peer", "dma_buf_during", "dma_buf_pinned"])
def test_dma_bufs_keep_to_the_documented_steps_of_either_kernel(scenario: str, era: str) -> None:
    run = kit.run("rdma_follows_migration", scenario=scenario, era=era, payload_bytes=4096, jitter=0.3)
    assert run.conformance.violations == [] and run.integrity.lost == 0 and not run.errors
    reached = set(run.conformance.steps_reached)
    assert era == "new" or "mlx5r_umr_dmabuf_update_pgsz" not in reached
    if era == "new" and scenario == "dma_buf":
        assert "mlx5r_umr_update_mr_page_shift" in reached, "device memory is in one piece, host memory is not"


def test_a_dma_buf_has_one_kind_of_region_and_needs_a_kernel_that_knows_it() -> None:
    for given, word in (
        ({"kind": "pinned"}, "kind = 'pinned': allowed is left alone with mover = dma_buf"),
        ({"era": "old"}, "era = 'old': allowed is mid or new with mover = dma_buf"),
    ):
        with pytest.raises(ParameterError, match=re.escape(word)):
            kit.run("rdma_follows_migration", mover="dma_buf", **given)


@pytest.mark.parametrize("scenario", ["pinned", "file_system_pinned", "dma_buf_pinned"])
def test_pinned_pages_do_not_move(scenario: str) -> None:
    m = metrics("rdma_follows_migration", scenario)
    assert m["pages_moved"] == 0 and m["pages_that_stayed"] == 32
    assert m["faults"] == 0 and m["lost_pages"] == 0


@pytest.mark.parametrize("mover", ["gpu", "file_system", "dma_buf"])
def test_without_notifiers_stale_data_is_detected_and_reported(mover: str) -> None:
    run = kit.run("rdma_follows_migration", mover=mover, notifiers=False)
    assert run.metrics["stale_pages_detected"] > 0 and run.errors
    assert all("no longer name" in line for line in run.errors)
    assert run.integrity.lost > 0, "what went to the old pages is lost, and the run says so"


# -- pitfalls of the transport


def test_packet_damming_costs_a_time_out_about_a_hundred_times_a_fault() -> None:
    """Three READs, two at a time: the third is posted while the second waits 4.48 ms, and is missed after 500 ms."""
    longest = {}
    for damming in (False, True):
        run = kit.run("mlx5_implicit_mr", scenario="packet_damming", packet_damming=damming)
        lost = run.trace.spans.column("step") == run.trace.steps.ids.get("packet_lost", -1)
        assert int(lost.sum()) == damming and run.metrics["faults"] == 3 and run.integrity.lost == 0 and not run.errors
        longest[damming] = run.metrics["message_max_us"]
    assert longest[True] - longest[False] == pytest.approx(500e3, rel=1e-3)
    assert 100 < (longest[True] - longest[False]) / (1280 * 3.5) < 120


def test_without_retries_packet_damming_fails_the_message() -> None:
    run = kit.run("mlx5_implicit_mr", scenario="packet_damming", retry_cnt=0)
    assert len(run.errors) == 1 and "RETRY_EXC_ERR" in run.errors[0]


# -- all scenarios


def test_between_them_the_scenarios_reach_every_step_of_the_seeds_tree() -> None:
    scenarios = (
        ("mlx5_implicit_mr", "default"), ("mlx5_implicit_mr", "no_fault_objects"), ("mlx5_odp_mr", "default"),
        ("mlx5_odp_mr", "larger_than_the_cache"), ("rc_pingpong", "iodp_prefetch"),
        ("rdma_follows_migration", "dma_buf"),
    )  # fmt: skip
    seen = {step for flow, name in scenarios for step in ran(flow, name).conformance.steps_reached}
    assert set(SEED.split()) - seen == set()


SEED = """
pp_init_ctx ibv_query_device_ex ibv_reg_mr mlx5_ib_odp_init mlx5_ib_reg_user_mr create_user_odp_mr mlx5r_odp_create_eq
mlx5_ib_eq_pf_action mempool_refill mempool_alloc mempool_free mlx5_ib_eq_pf_process mempool_create_kmalloc_pool
alloc_workqueue mlx5_ib_eq_pf_int mlx5_ib_eqe_pf_action mlx5_ib_pfault mlx5_ib_page_fault_resume
mlx5_eq_create_generic create_async_eq create_map_eq mlx5_frag_buf_alloc_node mlx5_init_fbc init_eq_buf
mlx5_irq_get_index mlx5_fill_page_frag_array mlx5_cmd_exec mlx5_debug_eq_add mlx5_eq_enable
mlx5_ib_alloc_implicit_mr ib_init_umem_odp mmu_interval_notifier_insert mlx5r_umr_can_load_pas ib_umem_odp_get
alloc_cacheable_mr mlx5_umem_dmabuf_default_pgsz ib_umem_find_best_pgsz mlx5_umem_needs_ats mkey_cache_ent_from_rb_key reg_create
mlx5_ib_create_mkey mlx5_core_create_mkey set_mr_fields _mlx5_mr_cache_alloc create_cache_mkey pop_mkey_locked
queue_adjust_cache_locked xa_init mlx5r_store_odp_mkey xa_store mlx5_ib_init_odp_mr pagefault_real_mr
ib_umem_odp_map_dma_and_lock mmu_interval_read_begin hmm_range_fault mmu_interval_read_retry hmm_pfn_to_map_order
ib_umem_odp_map_dma_single_page ib_dma_map_page dma_map_page mlx5r_umr_update_xlt mlx5r_umr_create_xlt
mlx5r_umr_alloc_xlt dma_map_single mlx5r_umr_set_update_xlt_ctrl_seg mlx5r_umr_set_update_xlt_mkey_seg
mlx5r_umr_set_update_xlt_data_seg mlx5_ib_invalidate_range mlx5_eq_update_cc mlx5_eq_update_ci
"""


def test_a_gpu_driver_that_slept_acts_now_and_not_in_the_past() -> None:
    run = kit.open("rdma_follows_migration").finish()
    closes = next(start for name, start, _ in run.stages if name == "deregister")
    table = run.trace.spans.array()
    released = run.trace.steps.words.index("dmirror_fops_release")
    (row,) = table[table[:, COLUMN["step"]] == released]
    assert row[COLUMN["start"]] >= closes
