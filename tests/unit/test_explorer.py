"""The explorer without a browser: controls, lanes, sessions, exports, trials."""

import contextlib
import io
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time

import pandas as pd
import pytest

from lora_theory import Problem, ProblemError, compare, predict
from lora_theory.cli import main
from lora_theory.explorer.answers import answer
from lora_theory.explorer.app import app
from lora_theory.explorer.controls import CONTROLS, problem_of, ranges, values_of
from lora_theory.explorer.exports import address
from lora_theory.explorer.lanes import Lane
from lora_theory.explorer.presets import PRESETS
from lora_theory.explorer.readouts import Point
from lora_theory.explorer.requests import VIEWS, Request
from lora_theory.explorer.session import Session
from lora_theory.explorer.trial import Trial, trial
from lora_theory.spelling import problem_of_texts

LINEAR = PRESETS["Published Fig 1, linear"].problem
NEGATIVE = LINEAR.to_toml().replace("label_noise = 0.5", "label_noise = -1.0").encode()
#: One problem for each field that a preset leaves at its default.
RARE = (
    {"teacher.law": "goe", "teacher_rank": None, "teacher.spikes": (2.0, -1.5)},
    {"teacher.law": "power_law", "teacher.exponent": 0.3, "teacher_rank": None},
    {"teacher.law": "eigenvalues", "teacher.eigenvalues": (1.0, -1.0 / 3), "teacher_rank": None},
    {"covariance.eigenvalues": (0.5, 1.5), "covariance.shifted": (1.5, 0.5)},
    {"covariance.eigenvalues": (0.5, 1.5), "compression.rank": 0.3,
     "compression.whitening": "one_sided", "compression.calibration": "anchored"},
    {"pretraining.regularizer": "separable", "pretraining.function": "abs(s)"},
    {"pretraining.regularizer": "preconditioned", "pretraining.degree": 3,
     "pretraining.scale": 2.0},
    {"finetuning.sequences": "reused", "finetuning.reused_fraction": 0.1 + 0.2,
     "finetuning.noise": "redrawn", "finetuning.rescaling": 1.1, "inverse_temperature": 0.7},
    {"finetuning.selection.pool": 9.0, "finetuning.selection.score": "function",
     "finetuning.selection.function": "variance"},
    {"finetuning": None},
)  # fmt: skip


def wait_for(condition, seconds=120.0):
    """Poll; False after so long."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def test_every_field_has_a_control_with_its_symbol_and_help():
    controls = {control.name: control for control in CONTROLS}
    for spec in Problem.specs():
        control = controls.pop(spec.name)
        assert control.help.startswith(spec.meaning)
        assert spec.symbol in control.label
        listed = "eigenvalues" in spec.name or spec.name in ("teacher.spikes", "covariance.shifted")
        typed = listed or spec.name.endswith("function")
        assert bool(control.range or control.choices) != typed
    assert all(control.switch for control in controls.values())


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_can_be_shown_and_are_solved(preset):
    chosen = PRESETS[preset]
    assert problem_of(values_of(chosen.problem)) == chosen.problem
    assert chosen.view in VIEWS
    assert chosen.field in ranges(chosen.problem)


def test_the_presets_are_the_regimes_that_they_name():
    worse = predict(PRESETS["LoRA worse than frozen"].problem).finetuning
    margin = worse.test_error - worse.frozen_test_error
    assert margin > 10 * worse.quadrature_error["test_error"]
    assert worse.branch == "informed"
    mismatch = PRESETS["Lower error, worse alignment"].problem
    low, high = (
        predict(mismatch.replace({"pretraining.penalty": factor * 0.08})).finetuning
        for factor in (0.8, 1.2)
    )
    assert low.test_error < high.test_error - 3 * low.quadrature_error["test_error"]
    assert low.overlap < high.overlap


@pytest.mark.parametrize("changes", RARE, ids=lambda changes: next(iter(changes)))
def test_controls_and_addresses_keep_all_digits_of_every_field(changes):
    problem = LINEAR.replace({"pretraining.penalty": 0.1 + 0.2, **changes})
    assert problem_of(values_of(problem)) == problem
    assert problem_of_texts(address(problem)) == problem
    assert problem_of(values_of(problem) | {"label_noise": "0.25"}) != problem


def test_controls_are_refused_with_the_words_of_the_problem():
    values = values_of(LINEAR)
    with pytest.raises(ProblemError, match=r"^tokens = 2.5 is not allowed: it must be an integer"):
        problem_of(values | {"tokens": "2.5"})
    with pytest.raises(ProblemError, match=r"^label_noise = 'many' is not allowed"):
        problem_of(values | {"label_noise": "many"})
    with pytest.raises(ProblemError, match=r"^pretraining.samples is missing"):
        problem_of(values | {"pretraining.samples": " "})
    hidden = values | {"teacher.exponent": "nonsense"}
    assert problem_of(hidden) == LINEAR  # its law has no exponent


# -- lanes -------------------------------------------------------------------------------------


def test_a_newer_job_supersedes_an_older_one_between_its_steps():
    seen, go, done = [], threading.Event(), threading.Event()
    closed = threading.Event()

    def old():
        try:
            while True:
                seen.append("old")
                go.set()
                yield
        finally:
            closed.set()

    def new():
        seen.append("new")
        done.set()
        yield

    lane = Lane(seen.append)
    lane.ask(old)
    assert go.wait(10)
    lane.ask(new)
    assert done.wait(10)
    assert closed.is_set()
    assert "old" not in seen[seen.index("new") :]
    lane.close()


def test_a_failure_is_told_and_the_lane_goes_on():
    told, done = [], threading.Event()

    def failing():
        yield
        raise ValueError("wrong")

    lane = Lane(told.append)
    lane.ask(failing)
    assert wait_for(lambda: bool(told), 10)
    lane.ask(lambda: iter([done.set()]))
    assert done.wait(10)
    assert isinstance(told[0], ValueError)
    lane.close()


def test_a_lane_ends_after_its_page_and_closes_its_job():
    begun, closed, lanes = threading.Event(), threading.Event(), []

    def endless():
        try:
            while True:
                begun.set()
                yield
        finally:
            closed.set()

    def page():
        lanes.append(Lane(print))
        lanes[0].ask(endless)
        begun.wait(10)

    threading.Thread(target=page).start()
    assert closed.wait(10)
    lanes[0]._thread.join(10)
    assert not lanes[0]._thread.is_alive()


# -- sessions ----------------------------------------------------------------------------------


class Shown:
    """A session without a page, and what it showed."""

    def __init__(self, query=()):
        self.points, self.views, self.words = [], [], []
        self.session = Session(
            dict(query), show_point=self.points.append, show_view=self.views.append,
            show_words=self.words.append,
        )  # fmt: skip

    def settled(self):
        point, view = self.session.point, self.session.shown
        same = point.problem == self.session.problem and view.request == self.session.request
        finished = point.refused or (point.refined and not point.waiting)
        return same and finished and (view.view is None or view.view.done >= 1)


@pytest.fixture
def shown():
    made = []

    def show(query=()):
        made.append(Shown(query))
        return made[-1]

    yield show
    for one in made:
        one.session.close()


QUICK = {"view": "spectrum"}


def test_a_refined_point_is_what_predict_says(shown):
    page = shown(QUICK)
    page.session.panel.values = {**page.session.panel.values, "pretraining.penalty": "0.0123456"}
    assert wait_for(lambda: page.session.point.refined and not page.session.point.waiting)
    problem = LINEAR.replace({"pretraining.penalty": 0.0123456})
    assert page.session.point.prediction == predict(problem)
    assert any(p.prediction and not p.refined and p.problem == problem for p in page.points)
    html = page.session.point.to_html()
    assert f'data-value="{predict(problem).finetuning.test_error!r}"' in html
    assert 'data-state="refined"' in html


def test_what_cannot_be_read_is_said_beside_its_control_and_nothing_is_lost(shown):
    page = shown(QUICK)
    good = page.session.problem
    page.session.panel.values = {**page.session.panel.values, "label_noise": "-1"}
    assert page.session.problem == good
    assert page.session.panel.fault["name"] == "label_noise"
    assert "label_noise = -1 is not allowed: it must be ≥ 0" in page.session.point.to_html()
    page.session.panel.values = {**page.session.panel.values, "label_noise": "1"}
    assert page.session.panel.fault == {}
    assert wait_for(lambda: page.session.point.refined)


@pytest.mark.parametrize("view", VIEWS)
def test_what_the_theory_refuses_is_said_in_every_view(shown, view):
    page = shown({**address(LINEAR), "view": view, "tokens": "9"})
    assert wait_for(lambda: page.session.point.refused and page.session.shown.png == b"")
    assert "at most 8" in page.session.point.to_html()
    assert "--tokens 9" in page.session.recipes()
    page.session.options.values = {**page.session.options.values, "view": "spectrum"}
    assert "bug" not in page.session.point.notice


@pytest.mark.parametrize("query", [{"tokens": ["2", "3"]}, {"view": ["map", "curve"]}])
def test_of_a_name_twice_in_the_address_the_last_counts(shown, query):
    page = shown(query)
    assert page.session.request.view == "curve"


def test_a_choice_that_no_menu_offers_is_refused(shown):
    page = shown({"view": "map", "points": "100000"})
    assert wait_for(lambda: "points = '100000' is not allowed" in page.session.shown.message)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_leaves_two_axes_for_a_map_and_no_ends_of_another_field(shown, preset):
    page = shown({"from": "0.05", "to": "0.2", **QUICK})
    page.session.choose(preset)
    options = page.session.request.options
    assert options["x"] != options["y"]
    assert options["from"] == options["to"] == ""
    page.session.options.values = {**page.session.options.values, "from": "1"}
    page.session.options.values = {**page.session.options.values, "along": "label_noise"}
    assert page.session.request.options["from"] == ""


def test_controls_that_are_refused_stay_refused_in_another_view(shown):
    page = shown(QUICK)
    page.session.panel.values = {**page.session.panel.values, "label_noise": "-1"}
    page.session.options.values = {**page.session.options.values, "view": "noise"}
    assert wait_for(lambda: page.session.shown.request.view == "noise" and page.session.shown.png)
    assert page.session.point.refused
    page.session.options.values = {**page.session.options.values, "simulate": "1"}
    assert page.words[-1].startswith("Not simulated: label_noise = -1 is not allowed")


def test_a_trial_that_theory_refuses_leaves_other_problems_alone(shown):
    page = shown({"view": "curve", **address(LINEAR.replace({"finetuning": None}))})
    refused = LINEAR.replace({"tokens": 9})
    page.session.trials[refused] = Trial(refused, (12,), 2, {12: [{}, {}]})
    page.session.options.values = {**page.session.options.values, "along": "label_noise"}
    assert wait_for(lambda: page.session.shown.request == page.session.request)
    assert "tokens" not in page.session.shown.message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"tokens = ", "is not valid TOML"),
        (b"\xff", "is not UTF-8"),
        (b"tokens = 2\n<b>bold</b> = 1", "is not valid TOML"),
        (b"tokens = 2", "pretraining.samples is missing"),
        (NEGATIVE, "label_noise = -1.0 is not allowed"),
    ],
)
def test_an_import_that_is_malformed_is_refused_in_words(shown, content, words):
    page = shown(QUICK)
    page.session.import_toml("mine.toml", content)
    assert words in page.session.point.notice
    assert page.session.problem == LINEAR
    assert "<b>bold" not in page.session.point.to_html()


def test_an_address_brings_everything_back(shown):
    page = shown({"view": "map", "x": "label_noise", **address(RARE_PROBLEM)})
    assert page.session.problem == RARE_PROBLEM
    again = shown(page.session.address())
    assert again.session.problem == RARE_PROBLEM
    assert again.session.request == page.session.request
    wrong = shown({"tokens": "2", "nonsense": "1"})
    assert "nonsense is not a field" in wrong.session.point.notice


RARE_PROBLEM = LINEAR.replace({"teacher.spikes": (2.0,), "finetuning.signal": 0.1 + 0.2})


def test_names_in_an_address_are_shown_as_text():
    html = Point(LINEAR, message="<script>", notice="<img src=x>").to_html()
    assert "<script>" not in html
    assert "<img" not in html


# -- exports -----------------------------------------------------------------------------------


def test_the_command_computes_what_is_shown(capsys):
    recipe = Request.of(LINEAR, {"view": "curve"}).recipe(RARE_PROBLEM, None)
    assert main([*shlex.split(recipe.shell())[1:], "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    expected = answer(RARE_PROBLEM)
    assert told["finetuning"]["test_error"] == expected.finetuning.test_error


def test_sizes_that_are_not_allowed_are_said_where_the_command_would_be(shown):
    page = shown({"view": "trial", "dims": "forty"})
    assert wait_for(page.settled)
    assert "dims = forty is not allowed: it must be an integer" in page.session.recipes()
    page.session.options.values = {**page.session.options.values, "simulate": "1"}
    assert "dims = forty is not allowed" in page.words[-1]


@pytest.mark.slow
def test_command_and_program_of_a_curve_compute_its_points(tmp_path):
    problem = LINEAR.replace({"finetuning": None})  # whose theory takes no time
    request = Request.of(problem, {"view": "curve", "from": "0.05", "to": "0.2"})
    *_, view = request.views(problem, [], None)
    recipe = request.recipe(problem, view)
    expected = view.table.query("observable == 'pretraining.test_error'")
    expected = expected.sort_values("pretraining.penalty")["value"].tolist()
    assert len(expected) > 20
    shell = recipe.shell().replace("lora-theory", f"{sys.executable} -m lora_theory.cli")
    shell += " --workers 0"
    subprocess.run(["bash", "-c", shell], cwd=tmp_path, check=True, capture_output=True)
    swept = pd.read_csv(tmp_path / "points" / "table.csv").sort_values("pretraining.penalty")
    assert swept["pretraining.test_error"].tolist() == pytest.approx(expected, rel=1e-12)
    names = {}
    exec(recipe.program(), names)
    programmed = [p.pretraining.test_error for p in names["predictions"]]
    assert programmed == expected


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_has_a_program_and_a_command_that_are_understood(view):
    recipe = Request.of(LINEAR, {"view": view}).recipe(LINEAR, None)
    head, _, _ = recipe.program().rpartition("\n" + recipe.calls[0].partition("\n")[0])
    names = {}
    exec(head, names)
    assert names["problem"] == LINEAR
    assert all(name in names for name in recipe.imports)
    with contextlib.redirect_stderr(io.StringIO()) as complaint:
        words = shlex.split(recipe.shell())[1:]
        main([*words, "--nonsense"])  # all else is read before
    assert "nonsense is not a flag" in complaint.getvalue()


def test_a_port_that_is_taken_is_refused_in_words(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["explore", "--no_browser", "--port", str(port)]) == 2
    assert f"host = 127.0.0.1, port = {port} is not allowed" in capsys.readouterr().err


def test_the_notebook_is_a_program_too():
    outputs, names = app.run()
    page = names["session"]
    assert wait_for(lambda: page.point.refined)
    page.close()
    assert page.problem == LINEAR
    assert len(outputs) > 5


# -- trials ------------------------------------------------------------------------------------


def alive(process_id):
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_a_trial_measures_what_compare_measures():
    problem = LINEAR.replace({"tokens": 2, "pretraining.samples": 0.5})
    *_, last = trial(problem, (12, 16), 2)
    compared = compare(problem, [12, 16], 2)
    for simulation in compared.simulations:
        rows = pd.DataFrame(last.runs[simulation.dim])
        expected = pd.DataFrame(simulation.runs)
        both = [name for name in expected if name in rows and expected[name].dtype == float]
        assert "finetuning.test_error" in both
        pd.testing.assert_frame_equal(rows[both], expected[both])


@pytest.mark.slow
def test_a_trial_that_is_closed_ends_its_process():
    steps = trial(LINEAR, (60,), 1000)
    next(steps)
    next(steps)
    process_id = steps.gi_frame.f_locals["process"].pid
    assert alive(process_id)
    steps.close()
    assert not alive(process_id)


@pytest.mark.slow
def test_a_trial_that_is_not_possible_is_refused_in_words():
    with pytest.raises(ProblemError, match=r"^dim = 2 is not allowed"):
        list(trial(LINEAR, (2,), 2))
