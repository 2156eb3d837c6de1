"""JointKDLoss with all of its terms: their sum, their weights, and what is logged."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from calm_model import calm

from icefall_kd import JointKDLoss, ModelTap, ctc_kd_loss
from icefall_kd.errors import KDError
from icefall_kd.losses import student_nodes
from icefall_kd.losses.full_sum import full_sum_kd_loss
from icefall_kd.losses.nodes import shift
from icefall_kd.losses.sequence import nbest_ctc_loss, nbest_transducer_loss
from icefall_kd.losses.student_nodes import StudentNodes
from icefall_kd.losses.transducer import total_kd_loss, transducer_kd_loss
from icefall_kd.teacher.teacher import Teacher
from icefall_kd.terms import (
    CtcTerm,
    FullSumTerm,
    HiddenTerm,
    NbestTerm,
    SimpleTerm,
    TransducerTerm,
)
from icefall_kd.terms.inputs import TermInputs
from icefall_kd.terms.schedule import Schedule
from icefall_kd.types import Targets

TERMS = ("ctc", "rnnt", "full_sum", "hidden", "nbest", "simple")
WEIGHTS = {
    "ctc": 0.7,
    "rnnt": 0.3,
    "full_sum": 0.2,
    "hidden": 0.6,
    "nbest": 0.4,
    "simple": 0.5,
}
KEYS = {
    *(f"kd_{name}_loss" for name in TERMS),
    *("kd_frames" if name == "ctc" else f"kd_{name}_frames" for name in TERMS),
}
Y = [[3, 4, 3], [5, 6], [7]]
LISTS = [[([3, 4], -0.5), ([3, 4, 3], -1.0)], [], [([7], -0.1)]]
T = 2.0
HARD = 37.0


@pytest.fixture(scope="module")
def given(make_model):
    """A student's forward pass, and what a teacher of other widths said."""
    g = torch.Generator().manual_seed(1)
    x, lens = torch.randn(3, 61, 20, generator=g), torch.tensor([61, 42, 23])
    wide = make_model(seed=1, encoder_dim="20,32", encoder_unmasked_dim="12,16")
    teacher = Teacher([wide], layers=["out", 0], with_simple=True)
    targets = teacher.targets(x, lens, y=Y, s_range=3)
    targets.parts["nbest"] = LISTS
    model = calm(make_model(seed=2), training=False)
    with (
        ModelTap(model, layers=[1], with_decoder=True, with_simple=True) as hook,
        torch.no_grad(),
    ):
        model(x=x, x_lens=lens, y=Y, prune_range=3)
        said = hook.take()
    return SimpleNamespace(x=x, lens=lens, model=model, said=said, targets=targets)


def leaves(said):
    """The student's outputs as leaves of a graph of their own."""
    return replace(
        said,
        encoder_out=said.encoder_out.detach().clone().requires_grad_(),
        ctc_logits=said.ctc_logits.detach().clone().requires_grad_(),
        simple_logits=said.simple_logits.detach().clone().requires_grad_(),
        decoder_out=said.decoder_out.detach().clone().requires_grad_(),
        hidden={i: h.detach().clone().requires_grad_() for i, h in said.hidden.items()},
    )


CLASSES = {
    "ctc": CtcTerm,
    "rnnt": TransducerTerm,
    "full_sum": FullSumTerm,
    "hidden": HiddenTerm,
    "nbest": NbestTerm,
    "simple": SimpleTerm,
}


def joint_of(*names, weight=None, hard_weight=0.3, schedule=None, **options):
    """The joint loss of the named terms.

    An option such as ``rnnt_form`` is a parameter of its term.
    """
    temperature = options.pop("temperature", T)
    terms = []
    for name in names:
        parameters = {"weight": WEIGHTS[name] if weight is None else weight}
        if name in ("ctc", "rnnt", "simple"):
            parameters["temperature"] = temperature
        if name == "hidden":
            parameters["layers"] = "out,0:1"
        for key, value in options.items():
            if key.startswith(f"{name}_"):
                parameters[key[len(name) + 1 :]] = value
        terms.append(CLASSES[name](**parameters))
    return JointKDLoss(terms, hard_weight, schedule)


def hard():
    return torch.tensor(HARD, requires_grad=True)


def frames(given):
    return float(given.targets.lens.sum())


def by_hand(name, given, student):
    """One term, from the losses' own functions."""
    model, targets = given.model, given.targets
    lens = student.encoder_out_lens
    states = (student.encoder_out, student.decoder_out, targets.parts["nodes"], lens)
    if name == "ctc":
        return ctc_kd_loss(
            student.ctc_logits, targets.parts["ctc"], targets.lens, temperature=T
        )
    if name == "simple":
        return ctc_kd_loss(
            student.simple_logits, targets.parts["simple"], targets.lens, temperature=T
        )
    if name == "rnnt":
        return transducer_kd_loss(model.joiner, *states, temperature=T)
    if name == "full_sum":
        return full_sum_kd_loss(StudentNodes(model.joiner, *states))
    if name == "hidden":
        term = HiddenTerm(layers="out,0:1")
        term.prepare(student, targets)
        return term.value(TermInputs(student, targets))[0]
    return nbest_ctc_loss(student.ctc_logits, LISTS, lens) + nbest_transducer_loss(
        model, student.encoder_out, LISTS, lens
    )


def gradients(loss, given, student):
    """Of all that a term may reach; 0 where it doesn't."""
    inputs = {
        "encoder_out": student.encoder_out,
        "ctc_logits": student.ctc_logits,
        "simple_logits": student.simple_logits,
        "decoder_out": student.decoder_out,
        **{f"stack {i}": h for i, h in student.hidden.items()},
        **dict(given.model.named_parameters()),
    }
    grads = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    return {
        name: torch.zeros_like(x) if g is None else g
        for (name, x), g in zip(inputs.items(), grads)
    }


# The sum


@pytest.mark.parametrize("names", [TERMS, *((name,) for name in TERMS)], ids=str)
def test_the_loss_is_the_sum_by_hand_in_value_and_gradient(given, names):
    student = leaves(given.said)
    loss, info = joint_of(*names)(hard(), student, given.targets, given.model)
    found = gradients(loss, given, student)
    total = 0.3 * HARD
    expected = {name: torch.zeros_like(g) for name, g in found.items()}
    for name in names:
        other = leaves(given.said)
        value = by_hand(name, given, other)
        assert value > 0.05
        assert info[f"kd_{name}_loss"] == pytest.approx(float(value), rel=1e-5)
        total += WEIGHTS[name] * float(value)
        parts = gradients(value, given, other)
        assert max(float(g.abs().max()) for g in parts.values()) > 0.01  # not dropped
        for key, g in parts.items():
            expected[key] += WEIGHTS[name] * g
    assert float(loss) == pytest.approx(total, rel=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TERMS)
def test_a_terms_weight_is_its_own(given, name):
    """Twice the weight of one term adds that term once more, and no other."""
    losses = []
    for factor in (1, 2):
        options = {f"{name}_weight": factor * WEIGHTS[name]}
        joint = joint_of(*TERMS, **options)
        loss, info = joint(hard(), leaves(given.said), given.targets, given.model)
        losses.append(float(loss))
    more = WEIGHTS[name] * info[f"kd_{name}_loss"]
    assert losses[1] - losses[0] == pytest.approx(more, rel=1e-3) and more > 0.05


def test_what_is_logged_is_unweighted_and_counts_its_frames(given):
    joint = joint_of(*TERMS, weight=0.01)
    _, info = joint(hard(), leaves(given.said), given.targets, given.model)
    assert set(info) == KEYS and all(type(v) is float for v in info.values())
    for name in TERMS:
        value = float(by_hand(name, given, leaves(given.said)))
        assert info[f"kd_{name}_loss"] == pytest.approx(value, rel=1e-5)
    lens = given.targets.lens.tolist()
    assert info["kd_nbest_frames"] == lens[0] + lens[2]  # the second has no list
    for key in ("kd_frames", "kd_rnnt_frames", "kd_full_sum_frames"):
        assert info[key] == sum(lens)
    assert info["kd_hidden_frames"] == sum(lens)


def test_the_hard_losss_weight_reaches_its_gradient(given):
    for names in (TERMS, ("nbest",)):
        hard_loss = hard()
        joint = joint_of(*names)
        joint(hard_loss, leaves(given.said), given.targets, given.model)[0].backward()
        assert float(hard_loss.grad) == pytest.approx(0.3)


@pytest.mark.parametrize("epoch, share", [(0, 0.0), (16.5, 0.3), (20, 1.0), (97, 0.0)])
def test_a_schedules_share_is_of_all_terms(given, epoch, share):
    """L = (1 - a) L_recipe + a L_kd, L_kd with the hard weight in it."""
    joint = joint_of(*TERMS, schedule=Schedule("warmup", 100, last_epochs=4))
    hard_loss, student = hard(), leaves(given.said)
    loss, info = joint(hard_loss, student, given.targets, given.model, epoch=epoch)
    kd = sum(WEIGHTS[n] * float(by_hand(n, given, leaves(given.said))) for n in TERMS)
    assert kd > 5
    expected = (1 - share) * HARD + share * (0.3 * HARD + kd)
    assert float(loss) == pytest.approx(expected, rel=1e-5) and set(info) == KEYS
    loss.backward()
    assert float(hard_loss.grad) == pytest.approx(1 - share + 0.3 * share)
    assert joint.weights(epoch) == pytest.approx(
        {"hard": 1 - 0.7 * share, **{n: share * w for n, w in WEIGHTS.items()}}
    )


def test_curves_move_each_weight_by_itself(given):
    joint = joint_of(*TERMS, hard_weight="0:1,4:0", nbest_weight="0:0,4:2")
    weights = joint.weights(1.0)
    assert weights == pytest.approx({**WEIGHTS, "hard": 0.75, "nbest": 0.5})
    student = leaves(given.said)
    loss, info = joint(hard(), student, given.targets, given.model, epoch=1.0)
    values = {n: info[f"kd_{n}_loss"] for n in TERMS}
    expected = 0.75 * HARD + sum(weights[n] * v for n, v in values.items())
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert not joint.is_constant and joint_of(*TERMS).is_constant


NONE = torch.zeros(3, dtype=torch.bool)  # of the rows has a transcript


def test_batches_without_transcripts_leave_the_hard_loss_out(given):
    hard_loss = hard()
    loss, info = joint_of(*TERMS)(
        hard_loss, leaves(given.said), given.targets, given.model, transcribed=NONE
    )
    expected = sum(WEIGHTS[n] * info[f"kd_{n}_loss"] for n in TERMS)
    assert float(loss) == pytest.approx(expected, rel=1e-5) and expected > 5
    loss.backward()
    assert hard_loss.grad == 0 and set(info) == KEYS


def test_they_leave_it_out_where_a_schedule_has_it_alone(given):
    joint = joint_of(*TERMS, schedule=Schedule("warmup", 100))
    args = (leaves(given.said), given.targets, given.model)
    loss, _ = joint(hard(), *args, epoch=3, transcribed=NONE)
    assert loss == 0


# Terms that are off


def off(*names):
    """Weights that are 0 up to epoch 5 and then as ever."""
    return {f"{n}_weight": f"5:0,6:{WEIGHTS[n]}" for n in names}


@pytest.fixture
def counted(monkeypatch):
    """How often each loss's function was called."""
    calls = dict.fromkeys(TERMS, 0)

    def count(owner, attribute, name):
        true = getattr(owner, attribute)

        def function(*args, **options):
            calls[name] += 1
            return true(*args, **options)

        monkeypatch.setattr(owner, attribute, function)

    for name, term in CLASSES.items():
        count(term, "value", name)
    return calls


@pytest.mark.parametrize("names", [TERMS, *((name,) for name in TERMS)], ids=str)
def test_a_term_whose_curve_is_0_costs_nothing_and_is_logged(given, counted, names):
    joint, student = joint_of(*TERMS, **off(*names)), leaves(given.said)
    loss, info = joint(hard(), student, given.targets, given.model, epoch=4)
    assert counted == {n: int(n not in names) for n in TERMS}
    assert set(info) == KEYS
    for name in TERMS:
        assert (info[f"kd_{name}_loss"] > 0) == (name not in names)
    expected = 0.3 * HARD
    expected += sum(WEIGHTS[n] * info[f"kd_{n}_loss"] for n in TERMS if n not in names)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    _, info = joint(hard(), student, given.targets, given.model, epoch=6)
    assert all(info[f"kd_{n}_loss"] > 0 for n in TERMS)


def test_a_full_sum_that_is_off_makes_no_logits(given, monkeypatch):
    joint = joint_of("rnnt", "full_sum", **off("full_sum"))
    args = (leaves(given.said), given.targets, given.model)
    monkeypatch.setattr(StudentNodes, "logits", lambda self: pytest.fail("asked"))
    _, info = joint(hard(), *args, epoch=4)
    assert info["kd_rnnt_loss"] > 0.1 and info["kd_full_sum_loss"] == 0


LACKING = {
    "nothing": {},
    "ctc": {"ctc": None},
    "lattice": {"nodes": None},
    "hidden": {"hidden": {}},
    "nbest": {"nbest": None},
    "lists": {"nbest": [[], [], []]},
    "simple": {"simple": None},
    "all": {"ctc": None, "nodes": None, "hidden": {}, "nbest": [], "simple": None},
}


def lacking_parts(targets, parts):
    return replace(targets, parts={**targets.parts, **parts})


@pytest.mark.parametrize("lacking", LACKING)
@pytest.mark.parametrize("epoch", [4, 6])
def test_all_batches_have_the_same_keys_in_the_same_order(given, lacking, epoch):
    """icefall adds them up over processes by their place."""
    joint = joint_of(*TERMS, **off("rnnt", "hidden"))
    targets = lacking_parts(given.targets, LACKING[lacking])
    student = leaves(given.said)
    loss, info = joint(hard(), student, targets, given.model, epoch=epoch)
    _, whole = joint(hard(), leaves(given.said), given.targets, given.model, epoch=6)
    assert list(info) == list(whole) and set(info) == KEYS
    zero = {
        "ctc": ["kd_ctc_loss", "kd_frames"],
        "lattice": [f"kd_{n}_{x}" for n in TERMS[1:3] for x in ("loss", "frames")],
        "hidden": ["kd_hidden_loss", "kd_hidden_frames"],
        "nbest": ["kd_nbest_loss", "kd_nbest_frames"],
        "lists": ["kd_nbest_loss", "kd_nbest_frames"],
        "simple": ["kd_simple_loss", "kd_simple_frames"],
        "all": list(info),
    }.get(lacking, [])
    assert all(info[key] == 0 for key in zero)
    if epoch == 6:
        assert all(info[key] > 0 for key in info if key not in zero)
    loss.backward()
    assert float(loss) >= 0.3 * HARD - 1e-3


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_garbage_in_the_padding_changes_nothing(given, garbage):
    for lacking in ("nothing", "ctc", "lattice", "nbest", "simple"):
        targets, found = lacking_parts(given.targets, LACKING[lacking]), []
        for value in (0.0, garbage):
            student = leaves(given.said)
            with torch.no_grad():
                for row, n in enumerate(student.encoder_out_lens.tolist()):
                    student.encoder_out[row, n:] = value
                    student.ctc_logits[row, n:] = value
                    student.simple_logits[row, n:] = value
            joint = joint_of(*TERMS)
            loss, info = joint(hard(), student, targets, given.model)
            loss.backward()
            heads = (student.encoder_out, student.ctc_logits, student.simple_logits)
            found.append((info, *(x.grad for x in heads)))
        assert found[0][0] == found[1][0], lacking
        assert all(torch.isfinite(g).all() for g in found[1][1:])
        torch.testing.assert_close(found[0][1:], found[1][1:])


def test_a_head_that_is_switched_off_is_in_no_key(given):
    joint = joint_of(*TERMS)
    for name in ("ctc", "rnnt", "full_sum"):
        del joint.terms[name]
    _, info = joint(hard(), leaves(given.said), given.targets, given.model)
    assert {k.replace("_frames", "_loss") for k in info} == {
        "kd_hidden_loss",
        "kd_nbest_loss",
        "kd_simple_loss",
    }
    assert joint.kinds == ["hidden", "nbest", "simple"]


def test_the_student_may_lack_either_head_for_its_lists(given):
    values = []
    for lacking in ({}, {"ctc_logits": None}, {"decoder_out": None}):
        student = replace(leaves(given.said), **lacking)
        _, info = joint_of("nbest")(hard(), student, given.targets, given.model)
        values.append(info["kd_nbest_loss"])
    assert values[0] == pytest.approx(values[1] + values[2], rel=1e-5)
    assert min(values) > 1


# The joiner


@pytest.fixture
def evaluations(given, monkeypatch):
    """How often the joiner's output layer ran, whole or inside a loss."""
    calls = []
    layer = given.model.joiner.output_linear
    handle = layer.register_forward_hook(lambda *args: calls.append("whole"))
    true = student_nodes.linear_kl

    def linear_kl(*args, **options):
        calls.append("in chunks")
        return true(*args, **options)

    monkeypatch.setattr(student_nodes, "linear_kl", linear_kl)
    yield calls
    handle.remove()


@pytest.mark.parametrize(
    "form, names, expected",
    [
        ("nodes", ("rnnt", "full_sum"), ["whole"]),
        ("collapsed", ("rnnt", "full_sum"), ["whole"]),
        ("sampled_u", ("rnnt", "full_sum"), ["whole"]),
        ("nodes", ("rnnt",), ["in chunks"]),
        ("nodes", ("full_sum",), ["whole"]),
    ],
)
def test_the_joiners_output_layer_is_evaluated_once(
    given, evaluations, form, names, expected
):
    joint = joint_of(*names, rnnt_form=form)
    joint(hard(), leaves(given.said), given.targets, given.model)
    assert evaluations == expected


@pytest.mark.parametrize(
    "options",
    [
        {"rnnt_form": "nodes"},
        {"rnnt_form": "collapsed"},
        {"rnnt_form": "mean_u"},
        {"rnnt_form": "sampled_u"},
        {"rnnt_form": "total"},
        {"rnnt_form": "nodes", "rnnt_shift": 2},
        {"rnnt_node_weighting": "equal"},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_rnnt_and_full_sum_are_together_what_they_are_apart(given, options):
    found = []
    for names in (("rnnt", "full_sum"), ("rnnt",), ("full_sum",)):
        torch.manual_seed(3)  # for sampled_u
        student = leaves(given.said)
        joint = joint_of(*names, hard_weight=0.0, **options)
        loss, info = joint(hard(), student, given.targets, given.model)
        assert all(v > 0.05 for v in info.values())
        found.append((float(loss), gradients(loss, given, student)))
    assert found[0][0] == pytest.approx(found[1][0] + found[2][0], rel=1e-5)
    apart = {k: g + found[2][1][k] for k, g in found[1][1].items()}
    torch.testing.assert_close(found[0][1], apart, rtol=1e-4, atol=1e-5)


def test_the_options_of_the_lattices_term_reach_it(given):
    """Each gives another value, that of the loss's own function."""
    targets, model, values = given.targets, given.model, set()
    for options in (
        {},
        {"rnnt_form": "collapsed"},
        {"rnnt_form": "mean_u"},
        {"rnnt_node_weighting": "equal"},
        {"rnnt_shift": 1},
        {"temperature": 1.0},
    ):
        student = leaves(given.said)
        lens = student.encoder_out_lens
        nodes = shift(targets.parts["nodes"], options.get("rnnt_shift", 0), lens)
        expected = transducer_kd_loss(
            model.joiner,
            student.encoder_out,
            student.decoder_out,
            nodes,
            lens,
            temperature=options.get("temperature", T),
            form=options.get("rnnt_form", "nodes"),
            node_weighting=options.get("rnnt_node_weighting", "occupancy"),
        )
        _, info = joint_of("rnnt", **options)(hard(), student, targets, model)
        assert info["kd_rnnt_loss"] == pytest.approx(float(expected), rel=1e-5)
        values.add(round(float(expected), 3))
    assert len(values) == 6


def test_total_mixes_both_heads(given):
    student = leaves(given.said)
    joint = joint_of("rnnt", rnnt_form="total")
    loss, info = joint(hard(), student, given.targets, given.model)
    asked = StudentNodes(
        given.model.joiner,
        student.encoder_out,
        student.decoder_out,
        given.targets.parts["nodes"],
        student.encoder_out_lens,
    )
    expected = total_kd_loss(
        asked, student.ctc_logits, given.targets.parts["ctc"], temperature=T
    )
    assert info["kd_rnnt_loss"] == pytest.approx(float(expected), rel=1e-5)
    grads = gradients(loss, given, student)
    for name in ("ctc_logits", "joiner.output_linear.weight", "decoder_out"):
        assert grads[name].abs().max() > 0.01, name
    assert joint.kinds == ["ctc", "lattice"]
    # Without CTC targets there is nothing to mix.
    bare = lacking_parts(given.targets, {"ctc": None})
    _, info = joint(hard(), leaves(given.said), bare, given.model)
    assert info == {"kd_rnnt_loss": 0.0, "kd_rnnt_frames": 0.0}


# A student that equals its teacher


@pytest.fixture(scope="module")
def equal(make_model, given):
    """A teacher's own outputs as the student's, and what it says."""
    model = make_model(seed=1).eval()
    with ModelTap(model, layers=[1], with_simple=True) as hook:
        said = hook.encode(given.x, given.lens)
    teacher = Teacher([model], layers=["out", 1], with_simple=True)
    targets = teacher.targets(given.x, given.lens, y=Y, s_range=3)
    model.requires_grad_(True)
    symbols = torch.zeros(3, 4, dtype=torch.int64)
    for row, y in enumerate(Y):
        symbols[row, 1 : 1 + len(y)] = torch.tensor(y)
    said.labels, said.decoder_out = symbols, model.decoder(symbols).detach()
    return SimpleNamespace(model=model, said=said, targets=targets)


@pytest.mark.parametrize(
    "name, options",
    [
        *(("ctc", {"ctc_frame_weighting": f}) for f in ("all", "non-blank", "entropy")),
        *(("rnnt", {"rnnt_form": f}) for f in ("nodes", "collapsed", "mean_u")),
        ("rnnt", {"rnnt_form": "sampled_u"}),
        ("rnnt", {"rnnt_form": "total"}),
        ("full_sum", {}),
        ("simple", {}),
        ("hidden", {"hidden_distance": "mse"}),
        ("hidden", {"hidden_distance": "cosine"}),
    ],
    ids=lambda x: x if isinstance(x, str) else "".join(map(str, x.values())),
)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_student_that_equals_its_teacher_has_zero_terms_and_gradients(
    equal, name, options, temperature
):
    options = {"hidden_layers": "out,1", **options}
    joint = joint_of(name, temperature=temperature, **options)
    found = {}
    for moved in (0.0, 1.0):  # the same terms are large for a student that differs
        student = leaves(equal.said)
        with torch.no_grad():
            g = torch.Generator().manual_seed(4)
            for x in (
                student.encoder_out,
                student.ctc_logits,
                student.simple_logits,
                *student.hidden.values(),
            ):
                x += moved * torch.randn(x.shape, generator=g)
        loss, info = joint(hard(), student, equal.targets, equal.model)
        grads = gradients(loss, equal, student)
        largest = max(float(g.abs().max()) for g in grads.values())
        found[moved] = (info[f"kd_{name}_loss"], largest)
        assert float(loss) == pytest.approx(
            0.3 * HARD + WEIGHTS[name] * found[moved][0], rel=1e-5
        )
    assert found[0.0][0] < 2e-4 and found[0.0][1] < 2e-4
    assert found[1.0][0] > 0.02 and found[1.0][1] > 0.002


# Half precision


def test_all_terms_under_autocast_are_near_those_in_float32(given):
    infos = []
    for on in (False, True):
        student = leaves(given.said)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            loss, info = joint_of(*TERMS)(hard(), student, given.targets, given.model)
        grads = gradients(loss, given, student)
        assert all(torch.isfinite(g).all() for g in grads.values())
        infos.append(info)
    for key, value in infos[0].items():
        assert infos[1][key] == pytest.approx(value, rel=0.03), key


# Refusals


@pytest.mark.parametrize(
    "options, words",
    [
        ({"ctc_weight": 0, "hard_weight": 0}, "are all 0, .*`hard_weight`"),
        ({"ctc_weight": "0:0,9:0", "hard_weight": "3:0"}, "are all 0"),
        ({"full_sum_weight": "x"}, "`FullSumTerm.weight` is 'x', .* finite number"),
        ({"hidden_weight": -1}, "`HiddenTerm.weight` is -1, "),
        ({"nbest_weight": "2:1,1:0"}, "`NbestTerm.weight` is '2:1,1:0'"),
        ({"hidden_layers": ""}, "no layers are named: give `HiddenTerm.layers`"),
        ({"rnnt_form": "mean"}, "`TransducerTerm.form` is 'mean': give one of nodes"),
        (
            {"rnnt_node_weighting": "none"},
            "`TransducerTerm.node_weighting` is 'none': .*occupancy, equal",
        ),
        (
            {"ctc_frame_weighting": "blank"},
            "`CtcTerm.frame_weighting` is 'blank': give one of all",
        ),
        (
            {"full_sum_form": "left"},
            "`FullSumTerm.form` is 'left': give one of two-sided, one-sided",
        ),
        ({"rnnt_shift": -2}, "`TransducerTerm.shift` is -2"),
        ({"ctc_delay": -1}, "`CtcTerm.delay` is -1: give 0 or more frames"),
        ({"ctc_delay": 0.5}, "`CtcTerm.delay` is 0.5"),
        ({"ctc_symbol_weight": -1.0}, "`symbol_weight` is -1.0, .* from 0 on"),
        (
            {"ctc_symbol_weight": 2.0, "ctc_delay": 1},
            "`symbol_weight` is 2 and `delay` 1, .* leave one of them out",
        ),
        ({"rnnt_blank_weight": -1.0}, "`blank_weight` is -1.0, .* from 0 on"),
        (
            {"rnnt_blank_weight": 0.0, "rnnt_form": "total"},
            "`blank_weight` is 0 and `form` total, .* give `form` nodes",
        ),
        ({"hidden_distance": "l1"}, "`HiddenTerm.distance` is 'l1': .*mse, cosine"),
        ({"temperature": -1.0}, "temperature.* is -1.0"),
        (
            {"rnnt_form": "total", "rnnt_shift": 2},
            "`TransducerTerm.shift` is 2 and the form is total",
        ),
    ],
    ids=str,
)
def test_parameters_that_mean_nothing_are_refused_by_their_names(options, words):
    first = next(iter(options))
    names = [n for n in TERMS if first.startswith(f"{n}_")] or ["ctc"]
    with pytest.raises(KDError, match=words) as e:
        joint_of(*names, **options)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", TERMS)
def test_a_term_of_a_student_that_is_not_finite_is_left_out(given, name, caplog):
    student = leaves(given.said)
    with torch.no_grad():
        outputs = (student.encoder_out, student.ctc_logits, student.simple_logits)
        for x in (*outputs, *student.hidden.values()):
            x[0, 1] = math.nan
    recipe_loss = hard()
    joint = joint_of(name)
    loss, info = joint(recipe_loss, student, given.targets, given.model)
    assert loss == joint.weights()["hard"] * recipe_loss
    assert all(value == 0 for value in info.values())
    (warning,) = caplog.messages
    assert "NaN" in warning or "are not finite" in warning or "nan" in warning
    assert "\n" not in warning
    loss.backward()


def test_a_term_that_is_given_twice_is_refused():
    with pytest.raises(KDError, match="twice among ctc, hidden, ctc"):
        JointKDLoss([CtcTerm(), HiddenTerm(layers="out"), CtcTerm()])


def test_the_formula_names_every_term_and_option(given):
    joint = joint_of(*TERMS, ctc_delay=2, rnnt_shift=1, rnnt_node_weighting="equal")
    text = str(joint)
    for name in TERMS:
        assert f"{WEIGHTS[name]} * kd_{name}_loss" in text
    for words in (
        "0.3 * loss",
        "delays 0 to 2",
        "shifted by 1",
        "equal",
        "out:out,0:1",
    ):
        assert words in text, words
    assert text.endswith("temperature 2.0")
    assert str(JointKDLoss([CtcTerm("0:1,9:0.5")])).startswith("1.0 * loss + 0:1,9:0.5")


def test_the_ctc_terms_symbol_weight_reaches_its_value(given):
    joint = joint_of("ctc", ctc_symbol_weight=3.0)
    assert "symbols times 3" in str(joint)
    student = leaves(given.said)
    _, info = joint(hard(), student, given.targets, given.model)
    targets = given.targets
    args = (student.ctc_logits, targets.parts["ctc"], targets.lens)
    expected = ctc_kd_loss(*args, temperature=T, symbol_weight=3.0)
    assert info["kd_ctc_loss"] == pytest.approx(float(expected))
    assert expected > 1.01 * ctc_kd_loss(*args, temperature=T)


def test_the_transducers_weight_of_blank_reaches_its_value(given):
    values = {}
    for weight in (0.0, 1.0, 2.0):
        joint = joint_of("rnnt", rnnt_blank_weight=weight)
        assert ("blank times" in str(joint)) == (weight != 1)
        _, info = joint(hard(), leaves(given.said), given.targets, given.model)
        values[weight] = info["kd_rnnt_loss"]
    assert 0 < values[0.0] < values[1.0]
    of_blank = values[1.0] - values[0.0]
    assert values[2.0] - values[1.0] == pytest.approx(of_blank, rel=0.01)


def test_the_full_sum_terms_form_reaches_its_value(given):
    """A student that is above its teacher's log-probability learns two-sided alone."""
    model, student = given.model, leaves(given.said)
    nodes = given.targets.parts["nodes"]
    states = (student.encoder_out, student.decoder_out, nodes, given.targets.lens)
    values = {}
    for form in ("two-sided", "one-sided"):
        joint = joint_of("full_sum", full_sum_form=form)
        assert ("(one-sided)" in str(joint)) == (form == "one-sided")
        _, info = joint(hard(), student, given.targets, model)
        values[form] = info["kd_full_sum_loss"]
        expected = full_sum_kd_loss(StudentNodes(model.joiner, *states), form=form)
        assert values[form] == pytest.approx(float(expected))
    assert values["one-sided"] < values["two-sided"] - 0.01


def test_targets_on_parts_of_cuts_count_the_frames_that_both_have(given):
    """Rows that are not whole, of which the student has fewer frames."""
    t = given.targets
    parts = {k: t.parts[k] for k in ("ctc", "hidden")}
    longer = Targets(t.lens, t.mask, torch.zeros(3, dtype=torch.bool), parts)
    student = leaves(given.said)
    student.encoder_out_lens = student.encoder_out_lens - torch.tensor([2, 0, 1])
    _, info = joint_of("ctc", "hidden")(hard(), student, longer, given.model)
    assert info["kd_frames"] == info["kd_hidden_frames"] == frames(given) - 3
