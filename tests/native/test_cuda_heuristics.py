"""The CUDA back end's choices without a GPU: legal tiles, an order of tiles that cannot deadlock, workspaces, and why a
request is refused."""

import itertools

import pytest
import torch

from fused_lora import _C, backends
from fused_lora.backends import Request, cuda

F32, F16, BF16 = (_C.dtype_codes[name] for name in ("float32", "float16", "bfloat16"))
SHAPES = [(4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024), (8192, 8192), (2048, 2048), (8, 8), (136, 264)]
ROWS = [1, 16, 127, 128, 129, 512, 2048, 8192, 16384, 262144]
RANKS = [1, 8, 12, 16, 17, 32, 33, 64, 65, 100, 128, 256]
SMS = [2, 13, 114, 132]


def gemm_config(M=128, N=128, K=128, R=16, dtype=BF16, sms=132, **kind):
    return _C.lora_gemm_config(M=M, N=N, K=K, R=R, dtype=dtype, sms=sms, **kind)


def forward_plan(M=128, N=128, K=128, R=16, dtype=BF16, adapter_dtype=BF16, dropout=False, sms=132, plan=""):
    settings = dict(dtype=dtype, adapter_dtype=adapter_dtype, dropout=dropout, sms=sms, plan=cuda._values(plan))
    return _C.cuda_forward_plan(M=M, N=N, K=K, R=R, **settings)


def backward_plan(needs, M=128, N=128, K=128, R=16, dtype=BF16, adapter_dtype=BF16, sms=132, **settings):
    """`needs`: of dx, dA, dB and dbias."""
    settings = dict(dropout=False, deterministic=False) | settings
    settings["plan"] = cuda._values(settings.get("plan", ""))
    settings |= dict(zip(("need_x", "need_A", "need_B", "need_bias"), needs))
    return _C.cuda_backward_plan(M=M, N=N, K=K, R=R, dtype=dtype, adapter_dtype=adapter_dtype, sms=sms, **settings)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("makes_low", [False, True])
def test_gemm_configs_are_legal(makes_low, dropout, backward):
    turn = itertools.cycle(itertools.product((0, 128, 256), (False, True), (False, True)))
    for (K, N), M, R, sms in itertools.product(SHAPES, ROWS, RANKS, SMS):
        block_n, gradients, halves = next(turn)
        kind = dict(makes_low=makes_low, dropout=dropout, backward=backward, gradients=gradients, block_n=block_n)
        c = gemm_config(M, N, K, R, sms=sms, halves=halves, **kind)
        two = halves and c["col_tiles"] > 1 and sms > 3
        assert c["low_columns"] == (0 if not c["one_launch"] else 2 if two else 1)
        assert not two or c["grid"] >= 4, "two tiles wait for each other"
        assert block_n in (0, c["block_n"])
        assert c["smem_bytes"] <= _C.cuda_smem_limit == 227 * 1024
        tiles = c["stages"] * (c["block_m"] + c["block_n"] + c["rank_tile"]) * c["block_k"] * 2 + 2 * 64 * 64 * 2
        drops_left = dropout and not backward and c["one_launch"]
        assert c["dropout"] == (dropout and (backward or c["one_launch"])) and c["threads"] == (
            512 if c["gradients"] or drops_left else 384
        )
        side = (
            c["block_m"] * 2 * (c["gradients"] * c["rank_tile"] + drops_left * c["block_k"])
            + (dropout and backward) * c["block_m"] * c["block_n"] // 8
        )
        assert tiles + side < c["smem_bytes"]
        fits = backward and c["one_launch"] and (not dropout or c["block_n"] == 128 or c["rank_tile"] == 16)
        assert c["gradients"] == (gradients and fits)
        assert c["stages"] >= 3 and c["block_n"] in (128, 256)
        assert c["row_tiles"] * c["block_m"] * c["cluster"] >= M > (c["row_tiles"] - 1) * c["block_m"] * c["cluster"]
        assert c["col_tiles"] * c["block_n"] >= N > (c["col_tiles"] - 1) * c["block_n"]
        assert c["grid"] % c["cluster"] == 0 and 0 < c["grid"] <= sms
        assert c["low_blocks"] == -(-R // 64)
        assert c["one_launch"] == (makes_low and R <= 64)
        assert c["rank_tile"] in ((16, 32, 64) if c["one_launch"] else (0,)) and (
            not c["one_launch"] or c["rank_tile"] >= R
        )
        assert not (dropout and backward) or c["low_blocks"] <= c["stages"], (
            "a masked tile waits for all its low-rank blocks at once"
        )


def test_narrow_tiles_fill_the_card_where_wide_ones_cannot():
    def width(M, N):
        return gemm_config(M, N)["block_n"]

    assert width(8192, 4096) == width(8192, 14336) == width(8192, 1024) == width(2048, 4096) == 256
    assert width(512, 4096) == width(2048, 1024) == width(8192, 128) == 128


@pytest.mark.parametrize("low_columns", [0, 1, 2])
def test_every_tile_comes_once_and_after_what_it_waits_for(low_columns):
    for row_tiles, col_tiles in itertools.product((1, 2, 7, 8, 9, 32, 67), {max(1, low_columns), 2, 5, 16}):
        grid = dict(row_tiles=row_tiles, col_tiles=col_tiles, low_columns=low_columns)
        order = [_C.lora_gemm_tile(t=t, **grid) for t in range(row_tiles * col_tiles)]
        assert sorted(order) == sorted(itertools.product(range(row_tiles), range(col_tiles)))
        # The tiles that make a row block's h have lower numbers than all others that read it, and wait for none of
        # them; two that make it together come one after the other.
        makers = list(itertools.product(range(row_tiles), range(low_columns)))
        assert order[: len(makers)] == makers


def test_a_row_blocks_tiles_make_low_of_each_k_block_once():
    """Two columns each take half of K, column 1 a few blocks ahead, so that its half, the last one, is through before
    its tile ends; the others walk K from the start."""
    for low_columns, k_blocks in itertools.product((0, 1, 2), (2, 3, 4, 15, 16, 17, 64, 225)):
        walks = [_C.lora_gemm_walk(col=col, low_columns=low_columns, k_blocks=k_blocks) for col in range(4)]
        assert all(0 <= begin <= end <= k_blocks for _, begin, end in walks)
        made = [sorted((first + i) % k_blocks for i in range(begin, end)) for first, begin, end in walks]
        assert sorted(itertools.chain(*made)) == (list(range(k_blocks)) if low_columns else [])
        assert all(not part for part in made[low_columns:]) and all(first == 0 for first, _, _ in walks[2:])
        if low_columns == 2:
            (_, _, left), (lead, _, through) = walks[:2]
            half = -(-k_blocks // 2)
            assert len(made[0]) == half == left and lead == min(8, half) == k_blocks - through >= 1
            assert through >= left or k_blocks < 18, "column 1 waits for column 0's sums"


def check_regions(plan):
    used = sorted((offset, offset + size) for offset, size in plan["regions"].values() if size)
    assert all(begin % 256 == 0 for begin, _ in used)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(used))
    assert not used or used[-1][1] <= plan["bytes"]


def test_forward_plans():
    for (K, N), M, R, adapter, dropout in itertools.product(SHAPES, ROWS, RANKS, (BF16, F32), (False, True)):
        plan = forward_plan(M, N, K, R, adapter_dtype=adapter, dropout=dropout)
        check_regions(plan)
        most_rows = 128 if N <= 2048 else 64
        small = most_rows >= M and R <= 64 and not dropout
        words = plan["plan"].split("+")
        masked_apart = dropout and 4 * -(-M // 256) <= 66
        h = "h_shrink" if masked_apart or (dropout and R > 64) else "h_inside" if R <= 64 else "h_gemm"
        columns = {1: ["h_single"], 2: ["h_halves"]}.get(plan.get("gemm", {}).get("low_columns"), [])
        assert words[1:] == [h, *columns, "overlap"] and bool(columns) == (h == "h_inside" and not small)
        assert words[0] == ("small" if small else f"y{plan['gemm']['block_n']}")
        assert ("small" in plan) == small and ("gemm" in plan) != small
        size = {name: size for name, (_, size) in plan["regions"].items()}
        assert size["A"] == (2 * R * K if adapter == F32 else 0)
        assert size["B"] == (2 * N * (-(-R // 8) * 8) if adapter == F32 or R % 8 else 0)
        one_launch = "h_inside" in words and not small
        assert (size["control"] >= 4 * (32 + -(-M // 64))) if one_launch else size["control"] == 0
        assert ("h_gemm" in plan) == ("h_gemm" in words)
        if "h_gemm" in plan:
            assert plan["h_gemm"]["col_tiles"] * plan["h_gemm"]["block_n"] >= R and plan["h_gemm"]["low_blocks"] == 0


def test_small_m_runs_in_one_wave_over_the_whole_card():
    for (K, N), M, R, sms in itertools.product(SHAPES, (1, 16, 17, 32, 33, 64, 65, 128), (1, 16, 64), SMS):
        c = forward_plan(M, N, K, R, sms=sms, plan="small")["small"]
        assert c["rows"] >= M and c["rows"] in (16, 32, 64, 128) and c["stages"] >= 3
        assert c["stages"] * (c["rows"] + 192) * 128 < c["smem_bytes"] <= _C.cuda_smem_limit
        assert c["strips"] * c["cols"] >= N > (c["strips"] - 1) * c["cols"]
        assert c["splits"] in (1, 2, 4, 8) and c["splits"] <= -(-K // 64), "each part of K has a step"
        resident = sms * (228 * 1024 // (c["smem_bytes"] + 1024))
        assert resident >= sms * (2 if M <= 64 else 1)

        def fits(splits):  # 16 clusters of 8 took two waves on 132 SMs
            return c["strips"] * splits <= (sms * 6 // 7 if splits == 8 else sms) and splits <= -(-K // 64)

        assert c["splits"] == 1 or fits(c["splits"]), "two waves"
        assert c["splits"] == 8 or not fits(2 * c["splits"]), "SMs without a block"


def test_shrink_shares_k_as_far_as_its_blocks_are_resident_at_once():
    for (K, _), M, R, sms in itertools.product(SHAPES, ROWS, RANKS, SMS):
        tile, steps = next(t for t in (16, 32, 64) if t >= min(R, 64)), -(-K // 128)
        blocks = -(-M // 32) * -(-R // tile)
        resident = sms * {16: 4, 32: 3, 64: 2}[tile]
        splits = _C.cuda_shrink_splits(M=M, K=K, R=R, sms=sms)
        assert splits in (1, 2, 4, 8)
        assert splits == 1 or (blocks * splits <= resident and 2 * splits <= steps), "two steps each at least"
        full = 2 * splits * blocks > resident or 4 * splits > steps
        assert full or splits == 8, "more blocks would be resident, and have work"


def test_backward_plans_ask_only_for_what_is_needed():
    every = itertools.product(
        (1, 300, 8192),
        (8, 12, 64, 256),
        (False, True),
        (F16, F32),
        (False, True),
        itertools.product((False, True), repeat=4),
    )
    for M, R, dropout, adapter, deterministic, needs in every:
        N, K = 1024, 4096
        need_x, need_A, need_B, need_bias = needs
        plan = backward_plan(needs, M, N, K, R, F16, adapter, dropout=dropout, deterministic=deterministic)
        check_regions(plan)
        size = {name: size for name, (_, size) in plan["regions"].items()}
        assert ("gemm" in plan) == need_x and plan.get("gemm", {}).get("dropout", dropout) == dropout
        words = plan["plan"].split("+")
        dh = "dh_gemm" if R > 64 else "dh_inside" if need_x else "dh_shrink"
        assert [word for word in words if word.startswith("dh_")][:1] == [dh] * (need_x or need_A)
        assert any(word in ("dh_single", "dh_halves") for word in words) == (dh == "dh_inside")
        assert size["dh"] == (2 * M * (-(-R // 8) * 8) if need_x or need_A else 0)
        inside = "wgrad_warpgroup" in words
        wanted = (need_A or need_B) and not deterministic and need_x
        fits = wanted and R <= 32 and (not dropout or plan["gemm"]["block_n"] == 128 or R <= 16)
        assert inside == fits == plan.get("gemm", {}).get("gradients", False)
        assert ("wgrad_apart" in words) == ((need_A or need_B) and not inside)
        assert ("wgrad" in plan) == ((need_A or need_B) and not inside)
        sums = (
            plan["wgrad"]["splits"] if "wgrad" in plan else int(inside and adapter != F32)
        )  # fp32 outputs are summed up in place
        assert (size["dA"], size["dB"]) == (4 * sums * R * K * need_A, 4 * sums * R * N * need_B)
        assert ("bias_wgrad" in plan) == (need_bias and (inside or not need_B))
        assert size["dbias"] == 4 * N * need_bias * (plan["bias_wgrad"]["splits"] if "bias_wgrad" in plan else sums)


def test_wgrad_covers_every_row_once_and_fills_the_card():
    for M, R, (K, N) in itertools.product(ROWS, RANKS, SHAPES):
        w = backward_plan((False, True, True, False), M, N, K, R)["wgrad"]
        assert w["rows_per_split"] % 64 == 0 and w["smem_bytes"] <= _C.cuda_smem_limit
        assert (w["splits"] - 1) * w["rows_per_split"] < M <= w["splits"] * w["rows_per_split"]
        assert w["rank_tile"] * w["rank_chunks"] >= R > w["rank_tile"] * (w["rank_chunks"] - 1)
        blocks = w["splits"] * w["rank_chunks"] * (-(-K // 128) + -(-N // 128))
        assert w["splits"] == 1 or blocks <= 132 * (228 * 1024 // (w["smem_bytes"] + 1024)), "more than one wave"
    w = backward_plan((False, True, True, False), 8192, 4096, 4096)["wgrad"]
    assert w["splits"] * 64 >= 2 * 132


def combinations():
    """Every plan of at most one word a field, of the launches one each in turn: they exclude nothing."""
    fields: dict[int, list[str]] = {}
    for word, field, _ in _C.cuda_plan_words:
        fields.setdefault(field, [""]).append(word)
    *others, launches = fields.values()
    made = zip(itertools.product(*others), itertools.cycle(launches))
    return ["+".join(filter(None, (*words, launch))) for words, launch in made]


@pytest.mark.parametrize("dropout", [False, True])
def test_a_plan_is_followed_or_refused_by_name(dropout):
    """Every combination of words at sizes where each field matters: what was said is done, and only what excludes
    something is refused."""
    every, plans = (True,) * 4, combinations()
    for M, R in ((64, 16), (64, 64), (300, 32), (300, 100)):
        refused = 0
        for plan in plans:
            said = set(plan.split("+")) - {""}
            sizes = dict(M=M, N=264, K=520, R=R, dropout=dropout, plan=plan)
            try:
                forward, backward = forward_plan(**sizes), backward_plan(every, **sizes)
            except ValueError as error:
                refused += 1
                named = str(error).partition("; got ")[0].replace(",", " ").replace(":", " ").split()
                assert said & set(named) and str(error).endswith(f"got '{plan}'"), plan
                continue
            done = {*forward["plan"].split("+"), *backward["plan"].split("+")}
            assert said - ({"h_warps"} if not dropout else set()) <= done, (plan, done)
            check_regions(forward), check_regions(backward)
        assert 0 < refused < len(plans)
    # what a call does not need, and what deterministic mode forbids, is left out
    words = backward_plan((False, True, False, False), plan="wgrad_warpgroup+dx128+dh_inside")["plan"]
    assert words == "dh_shrink+wgrad_apart+overlap"
    assert "wgrad_apart" in backward_plan(every, plan="wgrad_warpgroup", deterministic=True)["plan"]


def test_halves_take_two_columns_two_blocks_and_two_clusters():
    """Then a region for column 0's sums is there, else the plan is refused by name; what does not need dx leaves dh's
    halves out."""
    both, every = "h_halves+dh_halves", (True,) * 4
    for M, R, dropout in itertools.product((1, 300, 8192), (1, 17, 64), (False, True)):
        sizes = dict(M=M, R=R, dropout=dropout, plan=both)
        for plan in (forward_plan(N=520, K=72, **sizes), backward_plan(every, N=72, K=520, **sizes)):
            check_regions(plan)
            rows, c = -(-M // 256) * 256, plan["gemm"]
            assert plan["regions"]["low_sums"][1] == 4 * rows * c["rank_tile"] and c["low_columns"] == 2
            assert plan["regions"]["control"][1] == 4 * (32 + rows // 64) and "halves" in plan["plan"]
        for change in (dict(N=128), dict(K=64), dict(N=256, plan=both + "+y256"), dict(sms=3)):
            with pytest.raises(ValueError, match="must not say h_halves with one column of tiles, K up to 64 or fewer"):
                forward_plan(**dict(N=520, K=72) | sizes | change)
        for change in (dict(K=128), dict(N=64), dict(K=256, plan=both + "+dx256"), dict(sms=3)):
            with pytest.raises(
                ValueError, match="must not say dh_halves with one column of tiles, N up to 64 or fewer"
            ):
                backward_plan(every, **dict(N=72, K=520) | sizes | change)
    apart = backward_plan((False, True, True, False), plan=both)
    assert apart["plan"].startswith("dh_shrink+wgrad_apart") and apart["regions"]["low_sums"][1] == 0
    sizes = dict(M=300, N=520, K=520)
    assert "h_halves" in forward_plan(**sizes)["plan"] and "dh_halves" in backward_plan(every, **sizes)["plan"]
    single = forward_plan(**sizes, plan="h_single")
    assert "h_single" in single["plan"] and single["regions"]["low_sums"][1] == 0
    assert "h_single" in forward_plan(M=300)["plan"], "where there is one column, nobody is refused"


def test_what_the_loaders_warps_make_leaves_tiles_and_stages_as_they_are():
    """256 columns, three warpgroups, four stages."""
    for M, R in itertools.product((300, 8192), (1, 16, 17, 32)):
        made = forward_plan(M=M, N=4096, K=4096, R=R, dropout=True, plan="h_warps")
        c = made["gemm"]
        assert made["plan"].startswith("y256+h_warps+h_halves") and c["smem_bytes"] <= _C.cuda_smem_limit
        assert c["block_n"] == 256 and c["threads"] == 384 and c["stages"] == 4
    assert "h_inside" in forward_plan(M=300, plan="h_warps")["plan"], "without dropout there is nothing to mask"


def test_what_has_no_plan_is_an_error():
    for call, match in (
        (lambda: gemm_config(dtype=F32), "dtype must be 1"),
        (lambda: gemm_config(R=257), "R <= 256"),
        (lambda: gemm_config(M=0), "1 <= M"),
        (lambda: gemm_config(M=2**31), r"2\*\*31"),
        (lambda: gemm_config(sms=1), "2 SMs"),
        (lambda: _C.lora_gemm_tile(t=4, row_tiles=2, col_tiles=2, low_columns=1), "one of row_tiles"),
        (lambda: _C.lora_gemm_tile(t=0, row_tiles=2, col_tiles=1, low_columns=2), "low_columns must be 0, 1 or 2"),
        (lambda: _C.lora_gemm_walk(col=0, low_columns=2, k_blocks=1), "k_blocks must be at least 1 for each"),
        (lambda: forward_plan(R=300), "no plan"),
        (lambda: backward_plan((True,) * 4, M=0), "no plan"),
        (lambda: gemm_config(block_n=64), "block_n must be 128, 256"),
        (lambda: cuda._values("y64"), "plan must be of the words small, y128.*; got 'y64'"),
        (lambda: cuda._values("h_inside+serial+h_gemm"), "both h_inside and h_gemm; got 'h_inside.serial.h_gemm'"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def request_of(device="cuda", **others):
    """A request that the back end serves, for a device that this machine need not have, but for `others`."""
    served = dict(dtype=torch.bfloat16, adapter_dtype=torch.float32, M=64, N=16, K=32, R=8, aligned=True, optional=())
    return Request(device=torch.device(device, 0) if device == "cuda" else torch.device(device), **(served | others))


@pytest.fixture
def built(monkeypatch):
    """The back end as in a build for compute capability 9.0, on such a device."""
    monkeypatch.setattr(cuda, "_built", lambda: True)
    monkeypatch.setattr(cuda, "_architectures", lambda: ("80", "90a"))
    monkeypatch.setattr(cuda, "_capability", lambda index: (9, 0))


@pytest.mark.parametrize(
    "change, says",
    [
        ({"device": "cpu"}, "GPU tensors; got"),
        ({"dtype": torch.float32}, "bfloat16 and float16; got torch.float32"),
        ({"N": 33}, "multiples of 8; got N = 33, K = 32"),
        ({"K": 65}, "multiples of 8; got N = 16, K = 65"),
        ({"R": 257}, "ranks up to 256; got 257"),
        ({"aligned": False}, "contiguous rows that start on 16 bytes"),
        ({"optional": ("gate",)}, "plain LoRA only; got gate"),
    ],
)
def test_refusals_say_what_is_supported(built, change, says):
    assert says in cuda.refusal(request_of(**change))


@pytest.mark.parametrize("capability, got", [((8, 0), "8.0"), ((12, 0), "12.0")])
def test_other_devices_are_refused(built, monkeypatch, capability, got):
    monkeypatch.setattr(cuda, "_capability", lambda index: capability)
    assert cuda.refusal(request_of()) == f"GPUs of compute capability 9.0 (H100, H200); got {got}"


@pytest.mark.parametrize("M, R", [(1, 16), (0, 8), (128, 64), (256, 8), (8192, 16), (8192, 256)])
def test_plans_to_measure_are_right_with_and_without_dropout(built, monkeypatch, M, R):
    """Few, no two alike with dropout and without, each followed."""
    monkeypatch.setattr(cuda, "_sms", lambda index: 132)
    request = request_of(M=M, N=1024, K=4096, R=R)
    plans = cuda.plans(request)
    assert plans[0] == "" and 6 < len(plans) < 13 and len(set(plans)) == len(plans)
    assert any("dh_single" in plan for plan in plans) == (R <= 64)
    assert any("h_single" in plan.split("+") for plan in plans) == (R <= 64 and M > 128)
    done = set()
    for plan in plans:
        assert backends.pick(f"cuda:{plan}" if plan else "cuda", request) == (cuda, plan)
        sizes = [dict(M=max(M, 1), N=1024, K=4096, R=R, plan=plan, dropout=dropout) for dropout in (False, True)]
        done.add(tuple(made["plan"] for s in sizes for made in (forward_plan(**s), backward_plan((True,) * 4, **s))))
    assert len(done) == len(plans)
    assert backends.pick("cuda:dh_gemm+serial", request).plan == "dh_gemm+serial", "others on request"
    with pytest.raises(ValueError, match="both wgrad_warpgroup.* or dh_gemm|wgrad_warpgroup beyond 64 ranks"):
        backends.pick("cuda:dh_gemm+wgrad_warpgroup", request)


def test_a_servable_request_is_not_refused(built):
    assert cuda.refusal(request_of()) is None
    assert cuda.refusal(request_of(R=256, dtype=torch.float16, adapter_dtype=torch.float16)) is None


def test_a_build_without_the_machine_code_says_so(built, monkeypatch):
    monkeypatch.setattr(cuda, "_architectures", lambda: ("80",))
    assert "a build for 90a; this one is for 80" in cuda.refusal(request_of())
    monkeypatch.setattr(cuda, "_built", lambda: False)
    assert "this one has none" in cuda.refusal(request_of())
