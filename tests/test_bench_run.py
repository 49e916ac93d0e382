"""The bench's machinery: timing in turn, tables, the command. No test here asserts how fast anything is."""

import json
import platform

import pytest
import torch

from bench import correctness, cpu_goals, machine, measure, probes, readme, report, run, timing, workload
from bench.ours import missing_module
from bench.peers import base, catalog
from dualcodec_ext import DualCodecConfig, testing


@pytest.fixture(autouse=True)
def one_thread():
    """Everything here is tiny: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_file(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(DualCodecConfig.from_dict(testing.TINY).to_dict()))
    return path


# Timing


class FakeClock:
    """A clock that only the timed calls move."""

    def __init__(self):
        self.now = 0.0
        self.order = []

    def __call__(self):
        return self.now

    def call(self, name, cost):
        def run():
            self.order.append(name)
            self.now += cost

        return run


def test_sides_run_in_turn():
    clock = FakeClock()
    calls = [clock.call(name, cost) for name, cost in (("A", 1.0), ("B", 2.0), ("C", 4.0))]
    samples = timing.interleave(calls, 3, warmup=1, clock=clock)
    assert "".join(clock.order) == "ABC" + "ABC" * 3
    assert samples == [[1.0] * 3, [2.0] * 3, [4.0] * 3]


def test_short_calls_are_repeated_and_averaged():
    clock = FakeClock()
    samples = timing.interleave([clock.call("A", 1 / 1024)], 2, warmup=0, min_sample_s=0.1, clock=clock)
    assert samples == [[1 / 1024] * 2]
    assert len(clock.order) > 2 * 100


def test_percentiles_and_ratios():
    summary = timing.summarize([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (summary.p20_s, summary.p50_s, summary.p80_s, summary.rounds) == (2.0, 3.5, 5.0, 6)
    found = timing.ratio([4.0, 9.0, 4.0], [2.0, 3.0, 4.0])
    assert (found.of_medians, found.paired_median) == (4 / 3, 2.0)
    with pytest.raises(ValueError, match="samples must pair up, got 1 and 2"):
        timing.ratio([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        timing.interleave([], 0)


# One case


def side(name, build, **more):
    return measure.Side(name, name, torch.float32, build, **more)


def failing(error):
    def build():
        raise error

    return build


def sample_case():
    wanted = torch.linspace(-1, 1, 1000, dtype=torch.float64)[None, None]
    check = correctness.WaveCheck(wanted)
    case = measure.Case("a case", 2e9, lambda dtype: 1e6 * dtype.itemsize, 1.0, 10, check)
    calls = []

    def counted():
        def call():
            calls.append(1)
            return wanted + 1.0

        return call

    sides = [
        side("ours", lambda: lambda: wanted.float(), ours=True),
        side("right", lambda: lambda: wanted.float()),
        side("wrong", counted),
        side("absent", failing(base.Unavailable("thing is not installed"))),
        side("broken", failing(RuntimeError("two\nlines"))),
    ]
    return case, sides, calls


def test_a_wrong_side_is_not_timed_and_an_absent_one_is_named():
    case, sides, calls = sample_case()
    outcomes = measure.measure_case(case, sides, measure.Timing(3, settle_s=0.0, memory=True))
    assert [o.status for o in outcomes] == ["timed", "timed", "wrong", "unavailable", "failed"]
    assert len(calls) == 1  # the check, and never again
    assert outcomes[2].reason.startswith("wrong: ")
    assert [o.reason for o in outcomes[3:]] == ["thing is not installed", "RuntimeError: two lines"]
    assert [len(o.samples_s) for o in outcomes] == [3, 3, 0, 0, 0]


def a_ceiling():
    return probes.Ceilings(100.0, 120.0, {"mm C=48": 100.0}, {1 << 20: 50.0, 1 << 24: 20.0}, 10.0)


def described_case():
    case, sides, _ = sample_case()
    outcomes = measure.measure_case(case, sides, measure.Timing(2, settle_s=0.0))
    for outcome in outcomes[:2]:
        outcome.samples_s = [0.1, 0.1] if outcome.side.ours else [0.2, 0.4]
    return measure.describe(case, outcomes, {torch.float32: a_ceiling()})


def test_ratios_and_shares():
    ours, right, wrong, *_ = described_case()["sides"]
    assert ours["ours_is_faster"] == {"of_medians": 1.0, "paired_median": 1.0}
    assert right["ours_is_faster"]["of_medians"] == pytest.approx(3.0)
    assert (ours["gflops"], ours["share_of_gemm"]) == (pytest.approx(20.0), pytest.approx(0.2))
    assert (ours["gbs"], ours["share_of_copy"]) == (pytest.approx(0.04), pytest.approx(0.04 / 20))
    assert ours["share_of_limit"] == pytest.approx(0.2)
    assert ours["times_real_time"] == pytest.approx(10.0)
    assert "gflops" not in wrong
    assert wrong["samples_s"] == []


def test_the_limit_is_taken_in_turn_where_its_products_run():
    case, sides, _ = sample_case()
    calls = []
    products = {torch.float32: probes.Products(lambda: calls.append(1), 2e9)}
    outcomes = measure.measure_case(case, sides, measure.Timing(3, settle_s=0.0), products)
    assert len(calls) == 4  # warmed up, then once a round
    assert all(len(o.gemm_gflops) == len(o.samples_s) for o in outcomes)
    for outcome in outcomes[:2]:  # a machine that halves its rate for a round, and a round that something disturbs
        outcome.samples_s, outcome.gemm_gflops = [0.1, 0.2, 0.9], [80.0, 40.0, 80.0]
    ours = measure.describe(case, outcomes, {torch.float32: a_ceiling()})["sides"][0]
    assert ours["share_of_limit"] == pytest.approx(2e9 / 80e9 / 0.1)
    assert ours["gemm_gflops"] == [80.0, 40.0, 80.0] and ours["share_of_gemm"] == pytest.approx(0.1)


def test_products_cost_what_they_say(monkeypatch):
    ran = []

    def kernels(width, dtype, loops=8):
        def make():
            return lambda: ran.append(width) or 2.0 * 256 * 7 * width * width * loops

        return {"mm": failing(AssertionError("the slower one")), "own_conv": make}

    monkeypatch.setattr(probes, "_gemm_kernels", kernels)
    rates = {
        f"{name} C={width}": rate for name, rate in (("mm", 50.0), ("own_conv", 90.0)) for width in (48, 96, 192, 384)
    }
    found = probes.products(2, torch.float32, probes.Ceilings(90.0, 90.0, rates, {}, 1.0), seconds=0.5)
    assert found.call() == pytest.approx(found.flops) and found.flops == pytest.approx(0.5 * 90e9, rel=0.1)
    each = [ran.count(width) * width**2 for width in (48, 96, 192, 384)]
    assert max(each) < 1.1 * min(each)


def test_limit_is_the_longer_of_arithmetic_and_traffic():
    ceiling = a_ceiling()
    assert ceiling.limit_s(1e9, 8.0) == pytest.approx(0.01)
    assert ceiling.limit_s(1.0, 2e9) == pytest.approx(0.1)
    assert ceiling.copy_for(2 << 20) == 50.0
    assert ceiling.copy_for((2 << 20) + 1) == 20.0
    assert ceiling.copy_for(1e12) == 20.0


# Tables


@pytest.mark.parametrize("per_frame", [False, True])
def test_table_has_fixed_columns(per_frame):
    caption, titles, *lines = report.table_lines(described_case(), per_frame)
    assert caption == "a case: 2.00 GFLOP, 1.00 s of audio"
    assert ("us/frame" if per_frame else "x real") in titles
    for name in ("p20 ms", "p50 ms", "p80 ms", "/ours", "paired", "GFLOP/s", "limit"):
        end = titles.index(name) + len(name)
        for line in lines[:2]:
            assert line[end - 1] != " "
            assert line[end : end + 1] == " "
    assert "3.00x" in lines[1]
    assert "wrong: " in lines[2]
    assert lines[3].split(maxsplit=1) == ["absent", "unavailable: thing is not installed"]
    assert lines[4].split(maxsplit=1) == ["broken", "failed: RuntimeError: two lines"]


def test_machine_is_described_and_not_named():
    found = machine.describe()
    assert {"cpu", "cores", "isa", "torch", "memory_gib"} <= set(found)
    host = platform.node()
    if len(host) > 3:
        assert host not in json.dumps(found)


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_peak_memory_is_seen():
    def call():
        torch.ones(32 << 20).sum()

    peak = machine.peak_extra_bytes(call)
    if peak is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    assert 100 << 20 < peak < 400 << 20


def test_probes_measure_something():
    threads = torch.get_num_threads()
    found = probes.measure(2, torch.float32, seconds=0.002)
    assert probes.products(2, torch.float32, found, seconds=0.002).call() > 0
    assert torch.get_num_threads() == threads
    assert 0 < found.gemm_gflops <= found.gemm_peak_gflops
    assert all(rate > 0 for rate in (*found.copy_gbs.values(), *found.gemm_by_kernel.values(), found.read_gbs))
    assert json.dumps(found.to_dict())


# The command


@pytest.fixture
def quick(monkeypatch):
    """The command with probes that take no time, on one thread."""
    monkeypatch.setattr(probes, "measure", lambda *_: a_ceiling())
    return lambda *words: run.main([*words, "--rounds", "2", "--threads", "1"])


@pytest.mark.parametrize("what", ["decode", "encode"])
def test_command_writes_everything(quick, tiny_file, tmp_path, capsys, what):
    page, data = tmp_path / "run.md", tmp_path / "run.json"
    code = quick(
        *(what, "--config", str(tiny_file), "--seconds", "0.01", "--peers", "reference,folded2d,pypi"),
        *("--json", str(data), "--markdown", str(page)),
    )
    text = capsys.readouterr().out
    found = json.loads(data.read_text())
    assert found["cases"][0]["case"] == f"{what} tiny"
    sides = {row["side"]: row for row in found["cases"][0]["sides"]}
    assert list(sides) == ["dualcodec_ext", "reference", "folded2d", "pypi"]
    assert [len(sides[name]["samples_s"]) for name in ("reference", "folded2d")] == [2, 2]
    assert {"machine", "commit", "dirty", "threads", "ceilings", "command", "started"} <= set(found)
    assert page.read_text().count("\n| ") == 5
    if missing := missing_module():
        assert code == 1
        assert sides["dualcodec_ext"]["status"] == "unavailable"
        assert f"The compiled module is missing, so nothing of ours is measured: {missing}" in text
    else:
        assert code == 0
        assert sides["dualcodec_ext"]["status"] == "timed"


def test_wrong_result_of_ours_is_not_timed_and_fails_the_run(quick, tiny_file, monkeypatch, capsys):
    monkeypatch.setattr(run, "codec_call", lambda task, dtype, fast: lambda: torch.zeros(1, 1, 240 - 4))
    assert quick("decode", "--config", str(tiny_file), "--seconds", "0.01", "--peers", "none") == 1
    out = capsys.readouterr()
    assert "not timed" in out.out
    assert "Ours was wrong" in out.err


def test_missing_peer_is_named(quick, tiny_file, monkeypatch, capsys):
    find_spec = base.importlib.util.find_spec
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None if name == "openvino" else find_spec(name))
    quick("decode", "--config", str(tiny_file), "--seconds", "0.005", "--peers", "openvino2d,folded")
    assert "openvino2d     unavailable: openvino is not installed" in capsys.readouterr().out


def test_ops_command(quick, tiny_file, capsys):
    words = (
        "ops",
        "--config",
        str(tiny_file),
        "--seconds",
        "0.005",
        "--ops",
        "rvq_lookup",
        "--peers",
        "eager",
    )
    assert quick(*words) == (1 if missing_module() else 0)
    out = capsys.readouterr().out
    assert "tiny rvq_lookup acoustic Q=3 N=33 F=4" in out
    assert "us/frame" in out


def test_batches_and_backends(quick, tiny_file, tmp_path, capsys):
    data = tmp_path / "run.json"
    words = ("--config", str(tiny_file), "--seconds", "0.005", "--batch", "4", "--json", str(data))
    wanted = 1 if missing_module() else 0
    for what in ("decode", "encode"):
        assert quick(what, *words, "--peers", "folded", "--backends", "auto") == wanted
        case = json.loads(data.read_text())["cases"][0]
        assert (case["case"], case["batch"], case["item_frames"], case["frames"]) == (f"{what} tiny B=4", 4, 4, 16)
        assert [row["status"] for row in case["sides"]][1:] == ["timed"]
    assert quick("ops", *words, "--ops", "snake_upsample1d", "--peers", "folded2d", "--backends", "cpu,auto") == wanted
    found = json.loads(data.read_text())
    assert found["backends"] == ["cpu", "auto"]
    for case in found["cases"]:
        assert case["op"] == "snake_upsample1d" and case["steps"] % 4 == 0 and " B=4 " in case["case"]
        assert [row["side"] for row in case["sides"]] == ["dualcodec_ext cpu", "dualcodec_ext auto", "folded2d"]


def test_of_a_batch_the_first_and_the_last_item_are_compared():
    task = workload.make_task("decode", DualCodecConfig.from_dict(testing.TINY).to_dict(), 0.005, 1, "cpu", batch=4)
    check = workload.decode_check(task, torch.float32)
    whole = workload._reference(task, torch.float64).decode_from_codes(*task.inputs).detach()
    assert check(whole, torch.float32, ours=True).ok
    assert not check(whole[:3], torch.float32, ours=True).ok
    for item, fine in ((0, False), (1, True), (3, False)):
        wrong = whole.clone()
        wrong[item, 0, 5] += 0.1
        assert check(wrong, torch.float32, ours=True).ok == fine
    audio = workload.make_task("encode", dict(task.settings), 0.005, 1, "cpu", batch=4)
    codes = workload.encode_check(audio)
    found = workload._reference(audio, torch.float64).encode(
        audio.inputs[0].double(), semantic_repr=audio.inputs[1].double()
    )
    assert codes(found, torch.float32, ours=True).ok
    found[1][3, 1, 2] += 1
    assert not codes(found, torch.float32, ours=True).ok


def test_clips_of_a_batch_differ_where_they_are_compared_and_weights_are_shared():
    settings = DualCodecConfig.from_dict(testing.TINY).to_dict()
    one, two = (workload.make_task("encode", settings, 0.05, 1, "cpu", batch=batch) for batch in (5, 1))
    audio = one.inputs[0]
    assert audio.shape[0] == 5 and not torch.equal(audio[0], audio[-1]) and torch.equal(audio[:1], two.inputs[0])
    assert one.state is two.state and workload.seeded(settings) is workload.seeded(dict(settings))
    plain = testing.seeded_model(settings)
    codes = workload._reference(one, torch.float32).encode(audio, semantic_repr=one.inputs[1])
    assert all(map(torch.equal, codes, plain.encode(audio, semantic_repr=one.inputs[1])))
    other = workload.make_task("encode", {**settings, "decoder_dim": 64}, 0.05, 1, "cpu")
    assert other.state is not one.state


def test_the_pypi_package_under_autocast_and_tuned_graphs(tiny_file):
    theirs = {"codebook_dim": 8, "semantic_dim": 1024, "convnext_intermediate_dim": 2048, "latent_dim": 1024}
    settings = DualCodecConfig.from_dict({**testing.TINY, **theirs}).to_dict()
    task = workload.make_task("decode", settings, 0.005, 1, "cpu")
    by_name = {peer.name: peer for peer in catalog.CODEC_PEERS}
    for name in ("autotune-bf16", "recorded-bf16"):
        with pytest.raises(base.Unavailable, match="needs a GPU"):
            by_name[name].build(task)
    try:
        call = by_name["pypi-fp16"].build(task)
    except base.Unavailable as why:
        pytest.skip(str(why))
    assert workload.decode_check(task, torch.float16)(call(), torch.float16).ok


def test_peers_on_a_gpu():
    names = {peer.name for peer in catalog.select("all", torch.bfloat16, device="cuda")}
    assert {"pypi", "pypi-fp16", "autotune-bf16", "folded-bf16", "compile-bf16"} <= names
    assert not any(name.startswith(("ort", "openvino", "zentorch", "frozen")) for name in names)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["decode", "--batch", "0"], "--batch must be at least 1, got 0"),
        (["ops", "--backends", "triton"], "--backends must name some of cpu, auto on cpu, got triton"),
        (["decode", "--backends", "cpu,auto"], "--backends must name one for decode, got cpu,auto"),
        (["decode", "--peers", "nobody"], "--peers must name some of pypi, reference"),
        (["ops", "--peers", "nobody"], "--peers must name some of eager"),
        (["ops", "--ops", "nothing"], "--ops must name some of rvq_search"),
        (["decode", "--preset", "13hz"], "name must be one of 12hz_v1"),
        (["decode", "--seconds", "0"], "--seconds must be positive, got 0.0"),
        (["decode", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["decode", "--config", "nowhere.json"], "nowhere.json"),
    ],
)
def test_wrong_arguments_exit_with_2(words, match, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(words)
    assert stop.value.code == 2
    assert match in capsys.readouterr().err


def test_peers_are_listed(capsys):
    assert run.main(["decode", "--list"]) == 0
    out = capsys.readouterr().out
    for peer in catalog.CODEC_PEERS:
        assert peer.name in out
    assert "faiss-cpu" in out


def test_all_peers_are_those_of_the_dtype():
    names = [peer.name for peer in catalog.select("all", torch.float32)]
    assert {"pypi", "frozen2d", "ort2d", "openvino2d", "folded-bf16"} <= set(names)
    assert [name for name in names if name.endswith("16")] == ["folded-bf16"]
    names = [peer.name for peer in catalog.select("all", torch.bfloat16)]
    assert names[0] == "pypi"
    assert all(name.endswith("-bf16") for name in names[1:])


def test_stream(tiny_file, tmp_path, capsys):
    out, page = tmp_path / "stream.json", tmp_path / "stream.md"
    options = ["--config", str(tiny_file), "--frames", "5", "--threads", "1"]
    assert run.main(["stream", *options, "--json", str(out), "--markdown", str(page)]) == 0
    told = json.loads(out.read_text())
    ours, read = told["cases"][0]["sides"]
    assert len(ours["samples_s"]) == 5 and read["bytes"] > 0
    assert read["p50_s"] == pytest.approx(read["bytes"] / read["gbs"] / 1e9)
    assert "tiny float32 B=1" in capsys.readouterr().out and "tiny float32 B=1" in page.read_text()
    told["cases"][0]["model"] = "12hz_causal"
    row = next(row for row in cpu_goals.rows([told]) if "streamed" in row[0])
    assert row[2] == "<= 1.50x" and row[3] == f"{ours['p50_s'] / read['p50_s']:.2f}x"
    assert f"{ours['p50_s'] * 1e3:.1f} ms" in readme.section([told])
    with pytest.raises(SystemExit):
        run.main(["stream", "--frames", "0"])
    assert "--frames must be at least 1, got 0" in capsys.readouterr().err
