"""The lines that plug a recipe: every shape and layout, and every refusal of a text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_recipe import (
    DATA,
    DATA_LINES,
    TRAIN,
    TRAIN_LINES,
    added,
    as_formerly_plugged,
    data_of,
    follows,
    plugged,
    refused,
    replaced,
    train_of,
    wrapped,
)

from icefall_kd.plug.lines import (
    IMPORT,
    StaleLines,
    data_module,
    plug_data_module,
    plug_train,
)
from icefall_kd.plug.source import is_marked, unplug


def test_a_train_py_gets_five_lines_where_they_belong():
    new = plugged(TRAIN)
    assert added(TRAIN, new) == TRAIN_LINES
    assert follows(new, ")", IMPORT)
    assert follows(new, TRAIN_LINES[1], "    return parser")
    head = "def compute_loss(params, model, sp, batch, is_training):"
    assert follows(new, head, TRAIN_LINES[2])
    assert follows(new, "    info = MetricsTracker()", TRAIN_LINES[3])
    ddp = "        model = DDP(model, device_ids=[rank], find_unused_parameters=True)"
    assert follows(new, ddp, TRAIN_LINES[4])
    compile(new, "train.py", "exec")


def test_a_data_module_gets_two_lines_before_the_sampler():
    new = wrapped(DATA)
    assert added(DATA, new) == DATA_LINES
    assert follows(new, "from torch.utils.data import DataLoader", IMPORT)
    last = "            train = Dataset(cut_transforms=transforms, on_the_fly=True)"
    assert follows(new, last, DATA_LINES[1])


def test_plugging_twice_gives_the_same_bytes_and_undoing_the_first():
    for data, function in ((TRAIN, plugged), (DATA, wrapped)):
        new = function(data)
        assert function(new) == new != data
        assert unplug(new.encode(), "x").decode() == data
        assert is_marked(new.encode(), "x") and not is_marked(data.encode(), "x")


INFO_FIRST = (
    ("    info = MetricsTracker()\n", ""),
    (
        "    with grad(is_training):\n",
        "    info = MetricsTracker()\n    with grad(is_training):\n",
    ),
)
SHAPES = {
    "losses[:2]": [("losses[:3]", "losses[:2]")],
    "five losses": [
        ("losses = model(", "simple, pruned, ctc, attention, cr = model("),
        ("        for one in losses[:3]:\n            loss += one\n", ""),
        ("loss = 0.0", "loss = simple + pruned + ctc + attention + cr"),
    ],
    "use_ctc or not": [
        (
            "        for one in losses[:3]:\n            loss += one\n",
            "        if params.use_ctc:\n            loss = sum(losses[:5])\n"
            "        else:\n            loss = sum(losses[:2])\n",
        ),
    ],
    "graph_compiler and spec_augment": [
        (
            "(params, model, sp, batch, is_training)",
            "(params, model, graph_compiler, batch, is_training, spec_augment=None)",
        ),
    ],
    "loss outside the model": [
        ("        losses = model(", "        nnet_output, lens = model("),
        ("        loss = 0.0\n", ""),
        ("        for one in losses[:3]:\n            loss += one\n", ""),
        (
            "    assert loss.requires",
            "    loss = ctc(nnet_output, lens)\n    assert loss.requires",
        ),
    ],
    "two text arguments": [
        ("model, sp, batch, is_training)", "model, sp, sp_tgt, batch, is_training)")
    ],
    "annotated": [
        ("    params = get_params()", "    params: dict = get_params()"),
        ("    info = MetricsTracker()", "    info: dict = MetricsTracker()"),
        ("    optimizer = ", "    optimizer: object = "),
    ],
    "keyword-only": [("sp, batch, is_training)", "sp, *, batch, is_training)")],
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_of_compute_loss(name):
    text = train_of(*SHAPES[name])
    new = plugged(text)
    assert added(text, new) == TRAIN_LINES
    assert "MetricsTracker()\n" + TRAIN_LINES[3] in new


def test_info_that_stands_before_the_loss_waits_for_it():
    text = train_of(*INFO_FIRST)
    new = plugged(text)
    assert added(text, new) == TRAIN_LINES
    assert follows(new, "            loss += one", TRAIN_LINES[3])


def test_a_loss_of_an_if_without_else_is_still_waited_for():
    text = train_of(
        *INFO_FIRST,
        (
            "    assert loss.requires",
            "    if params.warm:\n        loss = 2 * loss\n    assert loss.requires",
        ),
    )
    assert follows(plugged(text), "        loss = 2 * loss", TRAIN_LINES[3])


def test_the_lines_use_the_names_of_the_recipe():
    text = TRAIN.replace("loss, info", "total, tracker").replace("info", "tracker")
    text = text.replace("    loss ", "    total ").replace("loss.", "total.")
    text = text.replace("batch", "minibatch").replace("parser", "options")
    text = text.replace("get_options", "get_parser").replace(" model", " net")
    text = text.replace("(model", "(net").replace("params = ", "hparams = ")
    new = added(text, plugged(text))
    assert new == [
        IMPORT,
        "    kd.add_arguments(options)",
        "    kd.begin(minibatch)",
        "    total = kd.joint_loss(total, tracker, net, minibatch)",
        "    kd.attach(hparams, net)",
    ]


def test_attach_stands_after_what_lies_between_ddp_and_the_optimizer():
    text = train_of(
        (
            "    optimizer = Sc",
            "    names = []\n    names.append(1)\n    optimizer = Sc",
        )
    )
    assert follows(plugged(text), "    names.append(1)", TRAIN_LINES[4])


def test_a_comprehension_is_no_assignment_of_the_loss():
    text = train_of(
        (
            '    info["loss"] = ',
            "    parts = [loss for loss in losses]\n" '    info["loss"] = ',
        )
    )
    assert follows(plugged(text), "    info = MetricsTracker()", TRAIN_LINES[3])


@pytest.mark.parametrize(
    "changes",
    [
        [
            (
                "        train = Dataset(cut_transforms=transforms)\n"
                "        if self.args.on_the_fly_feats:\n",
                "        if not self.args.on_the_fly_feats:\n"
                "            train = Dataset(cut_transforms=transforms)\n"
                "        else:\n",
            )
        ],
        [("sampler_state_dict=None)", "sampler_state_dict=None, rank=0)")],
        [("DataLoader(train, s", "DataLoader(dataset=train, s")],
        [
            ("        train_dl = DataLoader(train", "        return DataLoader(train"),
            ("        return train_dl\n", ""),
        ],
    ],
)
def test_shapes_of_a_data_module(changes):
    text = data_of(*changes)
    new = wrapped(text)
    assert added(text, new) == DATA_LINES
    last = "            train = Dataset(cut_transforms=transforms, on_the_fly=True)"
    assert follows(new, last, DATA_LINES[1])


def test_cuts_that_change_before_the_sampler_are_waited_for():
    text = data_of(
        (
            "        if self.args.bucketing_sampler:",
            "        cuts_train = cuts_train.filter(keep)\n"
            "        if self.args.bucketing_sampler:",
        )
    )
    assert follows(
        wrapped(text), "        cuts_train = cuts_train.filter(keep)", DATA_LINES[1]
    )


def test_two_classes_of_one_data_module():
    text = DATA + DATA[DATA.index("\n\nclass") :].replace("Toy", "Other")
    names = ["ToyDataModule", "OtherDataModule"]
    new = plug_data_module(text.encode(), "x.py", names).decode()
    assert added(text, new) == [*DATA_LINES, DATA_LINES[1]]
    assert plug_data_module(new.encode(), "x.py", names).decode() == new


def test_the_data_module_is_found_by_its_import():
    found = data_module(TRAIN.encode(), "train.py")
    assert found[:2] == ("asr_datamodule", "ToyDataModule")
    text = train_of(
        ("import ToyDataModule", "import Cuts as ToyDataModule"),
        ("from asr_datamodule", "from corpus"),
    )
    assert data_module(text.encode(), "train.py")[:2] == ("corpus", "Cuts")


# --- layout --------------------------------------------------------------------------


def layouts():
    tabs = "\n".join(
        line.replace("    ", "\t") if line.startswith("    ") else line
        for line in TRAIN.split("\n")
    )
    return {
        "CRLF": TRAIN.replace("\n", "\r\n"),
        "tabs": tabs,
        "two spaces": TRAIN.replace("    ", "  "),
        "seven spaces": TRAIN.replace("    ", "       "),
        "no last newline": TRAIN.rstrip("\n"),
        "form feeds": TRAIN.replace("\n\n\ndef", "\n\f\n\ndef"),
        "trailing blanks": TRAIN.replace(":\n", ":  \n"),
        "a comment after every line": TRAIN.replace(")\n", ")  # oh\n"),
        "odd quotes": TRAIN.replace('"', "'").replace("'''", '"""'),
        "escapes": TRAIN.replace("A recipe", r"A \d recipe"),
        "no blank lines": TRAIN.replace("\n\n", "\n").replace("\n\n", "\n"),
    }


@pytest.mark.parametrize("name", layouts())
def test_layout_stays(name):
    text = layouts()[name]
    new = plug_train(text.encode(), "train.py")
    lines = added(text, new.decode())
    assert [line.strip() for line in lines] == [line.strip() for line in TRAIN_LINES]
    assert unplug(new, "train.py") == text.encode()
    assert plug_train(new, "train.py") == new
    if name == "CRLF":
        assert new.count(b"\n") == new.count(b"\r\n")
    if name == "tabs":
        assert b"\n\tkd.attach(params, model)\n" in new


@pytest.mark.parametrize(
    "encoding, start",
    [
        ("utf-8-sig", ""),
        ("gbk", "# -*- coding: gbk -*-\n"),
        ("latin-1", "# coding: latin-1\n"),
    ],
)
def test_encodings_stay(encoding, start):
    word = "数字" if encoding == "gbk" else "Zürich"
    text = start + TRAIN.replace("A recipe", word)
    data = text.encode(encoding)
    new = plug_train(data, "train.py")
    assert added(text, new.decode(encoding)) == TRAIN_LINES
    assert unplug(new, "train.py") == data


@st.composite
def noisy(draw):
    """The recipe, with comments and blank lines anywhere between its lines."""
    lines = []
    ending = draw(st.sampled_from(["\n", "\r\n"]))
    noise = st.sampled_from(["", "", "", "# kd.attach(params, model)", "   ", "\t# x"])
    inside = False
    for line in TRAIN.splitlines():
        if not inside:
            lines += draw(st.lists(noise, max_size=2))
        inside = line.count("(") > line.count(")") or (inside and ")" != line.strip())
        lines.append(line)
    return ending.join(lines) + draw(st.sampled_from(["", ending]))


@given(noisy())
def test_comments_and_blank_lines_do_not_matter(text):
    new = plug_train(text.encode(), "train.py")
    # A comment of the recipe may read like a line of ours, so count and compare.
    assert len(new.splitlines()) - len(text.encode().splitlines()) == len(TRAIN_LINES)
    assert unplug(new, "train.py") == text.encode()
    assert plug_train(new, "train.py") == new
    compile(new, "train.py", "exec")


def test_isort_may_move_the_import_and_black_add_lines():
    new = plugged(TRAIN)
    moved = replaced(new, IMPORT + "\n", "")
    moved = replaced(moved, "from asr_data", f"{IMPORT}\nfrom asr_data")
    moved = replaced(moved, "    kd.attach", "\n    kd.attach")
    assert plugged(moved) == moved


# --- refusals of a text --------------------------------------------------------------

STRANGE = {
    "no get_parser": [("def get_parser", "def parser_of")],
    "no compute_loss": [("def compute_loss", "def loss_of")],
    "two functions compute_loss": [
        ("def get_model", "def compute_loss(x):\n    return x\n\n\ndef get_model")
    ],
    "an early return": [
        ("    feature = ", "    if 1:\n        return 2\n    feature = ")
    ],
    "a bare loss": [("    return loss, info", "    return loss")],
    "a parser that is called": [("    return parser\n", "    return str(parser)\n")],
    "two parsers": [
        ("    parser.add_a", "    if 0:\n        return None\n    parser.add_a")
    ],
    "info is no tracker": [("info = MetricsTracker()", "info = dict()")],
    "no model is called": [("model(x=feature", "net(x=feature")],
    "two models are called": [("model(x=feature, y=", "model(x=feature, y=sp(1), z=")],
    "no batch": [('["supervisions"]["text"]', '["text"]')],
    "a loss from elsewhere": [
        ("sp, batch, is_training)", "sp, batch, is_training, loss)"),
        ("        loss = 0.0\n", ""),
        ("            loss += one\n", "            print(one)\n"),
    ],
    "loss written too early": [
        ("    info = MetricsTracker()\n", ""),
        (
            "    assert loss.requires_grad == is_training\n",
            '    info = MetricsTracker()\n    info["loss"] = 0\n    loss = loss * 2\n',
        ),
    ],
    "no DDP": [("model = DDP(model", "model = Wrap(model")],
    "no optimizer": [("    optimizer = ", "    steps = ")],
    "optimizer before DDP": [
        (
            "    if world_size > 1:",
            "    optimizer = Adam(model)\n    if world_size > 1:",
        ),
        ("    optimizer = Sc", "    _ = Sc"),
    ],
    "a copy after the optimizer": [
        ("    toy = ", "    model_avg = copy.deepcopy(model)\n    toy = ")
    ],
    "params from elsewhere": [("params = get_params()", "params = args_to_params()")],
    "no training data": [("toy.train_dataloaders", "toy.loaders")],
    "two training data": [
        (
            "    train_dl = toy",
            "    other = toy.train_dataloaders(1)\n    train_dl = toy",
        )
    ],
    "no imports": [
        (
            "import argparse\nimport copy\nfrom asr_datamodule import ToyDataModule\n",
            "",
        ),
        (
            "from utils import (\n    MetricsTracker,\n"
            "    get_parameter_groups_with_lrs,\n)\n",
            "",
        ),
    ],
    "a name kd": [("SIZE = 3", "SIZE = kd = 3")],
    "statements on one line": [
        (
            "    info = MetricsTracker()\n    info[",
            "    info = MetricsTracker(); info[",
        )
    ],
    "a return after a semicolon": [
        ("\n\n    return parser", "\n    parser = parser; return parser")
    ],
    "a line that goes on": [
        ("    info = MetricsTracker()\n", "    info = MetricsTracker() \\\n\n")
    ],
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_strange_train_py_is_refused_with_its_line(name):
    text = train_of(*STRANGE[name])
    sentence = refused(lambda: plugged(text, "z/train.py"), "z/train.py (line ")
    line = int(sentence.split("(line ")[1].split(")")[0])
    assert 1 <= line <= len(text.splitlines())


def test_a_recipe_with_a_name_kd_is_told_to_rename_it():
    for change in (
        ("SIZE = 3", "SIZE = kd = 3"),
        ("import copy", "import copy as kd"),
        ("def get_model(params)", "def get_model(kd)"),
        ("def get_model(params)", "def kd(params)"),
    ):
        text = train_of(change)
        line = [i for i, x in enumerate(text.splitlines(), 1) if "kd" in x][0]
        refused(lambda text=text: plugged(text, "x.py"), f"(line {line})", "rename it")


@pytest.mark.parametrize(
    "name", ["statements on one line", "a return after a semicolon"]
)
def test_statements_that_share_a_line_are_told_to_be_broken(name):
    text = train_of(*STRANGE[name])
    refused(lambda: plugged(text), "shares its line with another", "break the line")


def test_the_line_of_a_refusal_is_the_one_that_differs():
    text = train_of(STRANGE["a bare loss"][0])
    line = text.splitlines().index("    return loss") + 1
    refused(lambda: plugged(text, "z.py"), f"z.py (line {line})", "(loss, info)")


STRANGE_DATA = {
    "no class": [("class ToyDataModule", "class OtherDataModule")],
    "no method": [("def train_dataloaders", "def loaders")],
    "a dataset made in place": [("DataLoader(train, s", "DataLoader(Dataset(), s")],
    "one of two datasets made in place": [
        (
            "        return train_dl",
            "        if self.args.plain:\n"
            "            return DataLoader(Dataset(), sampler=train_sampler)\n"
            "        return train_dl",
        )
    ],
    "a sampler made in place": [
        ("DataLoader(train, sampler=train_sampler", "DataLoader(train, sampler=S(c)")
    ],
    "two kinds of cuts": [("SimpleCutSampler(cuts_train)", "SimpleCutSampler(other)")],
    "cuts made in place": [
        ("Sampler(cuts_train, shuffle", "Sampler(cuts_train.filter(keep), shuffle"),
        ("SimpleCutSampler(cuts_train)", "SimpleCutSampler(c=1)"),
    ],
    "a dataset after the sampler": [
        (
            "        train_dl = DataLoader(",
            "        train = Dataset()\n        train_dl = DataLoader(",
        )
    ],
    "a dataset from elsewhere": [
        ("sampler_state_dict=None)", "train)"),
        ("        train = Dataset(cut_transforms=transforms)\n", ""),
        ("            train = Dataset(cut", "            print(cut"),
    ],
    "only a dataset after the sampler": [
        ("        train = Dataset(cut_transforms=transforms)\n", ""),
        (
            "        if self.args.on_the_fly_feats:\n            train = Dataset("
            "cut_transforms=transforms, on_the_fly=True)\n",
            "",
        ),
        ("        train_dl = ", "        train = Dataset()\n        train_dl = "),
    ],
}


@pytest.mark.parametrize("name", STRANGE_DATA)
def test_a_strange_data_module_is_refused_with_its_line(name):
    text = data_of(*STRANGE_DATA[name])
    refused(lambda: wrapped(text, "z/asr_datamodule.py"), "z/asr_datamodule.py (line ")


@pytest.mark.parametrize(
    "text, line",
    [
        (
            train_of(("SIZE = 3", "SIZE = = 3")),
            TRAIN.splitlines().index("SIZE = 3") + 1,
        ),
        (train_of(("SIZE = 3", "SIZE = (3")), None),
        (train_of(("SIZE = 3", "SIZE = '\0'")), None),
        (TRAIN + "# coding: nonsense\n", 0),
        ("# coding: nonsense\n" + TRAIN, None),
    ],
)
def test_what_does_not_parse_is_refused(text, line):
    if line == 0:  # a coding line that far down is a comment
        assert plugged(text) != text
        return
    place = f"z.py (line {line})" if line else "z.py"
    refused(lambda: plugged(text, "z.py"), place, "is not valid Python", "py_compile")


@pytest.mark.parametrize(
    "old, new",
    [
        ("    kd.attach(params, model)\n", ""),
        ("kd.attach(params, model)", "kd.start(params, model, world_size)"),
        ("kd.joint_loss(loss, info, model, batch)", "kd.joint_loss(loss, batch)"),
        (f"{IMPORT}\n", "from icefall_kd.training import session, hooks as kd\n"),
        (f"{IMPORT}\n", "import icefall_kd.training.session as kd\n"),
        (
            "    kd.add_arguments(parser)\n    return parser\n\n\ndef get_params():\n",
            "    return parser\n\n\ndef get_params():\n    kd.add_arguments(None)\n",
        ),
    ],
)
def test_lines_of_another_version_are_stale_and_come_out(old, new):
    other = replaced(plugged(TRAIN), old, new)
    with pytest.raises(StaleLines, match=r"x.py \(line \d+\) carries other lines"):
        plugged(other, "x.py")
    assert unplug(other.encode(), "x.py").decode() == TRAIN


def test_the_lines_of_the_former_version_are_stale_and_come_out():
    for text, function in ((TRAIN, plugged), (DATA, wrapped)):
        former = as_formerly_plugged(function(text))
        refused(lambda f=function, x=former: f(x, "x.py"), "x.py (line ", "--undo")
        assert unplug(former.encode(), "x.py").decode() == text


def test_a_stale_line_is_named():
    other = replaced(plugged(TRAIN), "kd.attach(params, model)", "kd.start(params)")
    line = other.splitlines().index("    kd.start(params)") + 1
    refused(lambda: plugged(other, "x.py"), f"x.py (line {line})")


@pytest.mark.parametrize(
    "old, new",
    [
        ("    kd.attach(params, model)\n", "    if kd.on:\n        kd.attach(1, 2)\n"),
        ("    kd.attach(params, model)\n", "    if kd.on:\n        pass\n"),
        ("    kd.attach(params, model)\n", "    x = 1; kd.attach(params, model)\n"),
        ("    kd.attach(params, model)\n", "    kd.attach(params, model); x = 1\n"),
        (
            "    kd.attach(params, model)\n",
            "    if world_size:\n        kd.attach(1)\n",
        ),
    ],
)
def test_lines_that_nothing_inserts_do_not_come_out(old, new):
    other = replaced(plugged(TRAIN), old, new)
    refused(lambda: unplug(other.encode(), "x.py"), "x.py (line ", "out by hand")


def test_what_only_mentions_icefall_kd_is_not_plugged():
    text = train_of(
        ("SIZE = 3", "from icefall_kd.rnnt import get_engine\nSIZE = get_engine()"),
        ('"""A recipe', '"""kd.attach(), icefall_kd.recipe: a recipe'),
    )
    assert not is_marked(text.encode(), "x")
    assert unplug(plugged(text).encode(), "x").decode() == text
