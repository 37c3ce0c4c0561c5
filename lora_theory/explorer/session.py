"""One browser session: what its controls ask for, and what it has been answered."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import math
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pandas as pd

from lora_theory.compare import agreements
from lora_theory.explorer.answers import COARSE, FINE, Precision, answer
from lora_theory.explorer.controls import CONTROLS, GROUPS, problem_of, values_of
from lora_theory.explorer.exports import address
from lora_theory.explorer.lanes import Lane
from lora_theory.explorer.panel import Panel
from lora_theory.explorer.presets import PRESETS
from lora_theory.explorer.readouts import Point
from lora_theory.explorer.requests import Request, option_controls
from lora_theory.explorer.trial import Trial, trial
from lora_theory.explorer.views import Measured, View
from lora_theory.problem import Problem, ProblemError, parse_toml
from lora_theory.spelling import problem_of_texts

__all__ = ["Session", "Shown"]

START = PRESETS["Published Fig 1, linear"]
#: Seconds without a change after which refinement begins, and with no answer until it is explained.
_REST, _PATIENCE = 0.25, 1.5
_SOLVING = "Solving the equations …"
_COMPILING = "Compiling the equations of this kind of problem, once: this may take half a minute …"
#: Seconds between pictures of a simulation that goes on.
_PAUSE = 1.5
_KEPT_TRIALS = 12
#: matplotlib keeps caches that threads share.
_DRAWING = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Shown:
    """The view on the page: its picture, or the sentence that says why there is none."""

    problem: Problem
    request: Request
    view: View | None = None
    message: str = ""
    png: bytes = b""

    def to_html(self) -> str:
        """The picture with its caption, or the sentence."""
        if self.view is None:
            return f'<p class="view sentence">{html.escape(self.message)}</p>'
        busy = "" if self.view.done >= 1 else f" · {self.view.done:.0%} refined"
        source = base64.b64encode(self.png).decode()
        caption = html.escape(self.view.caption)
        return (
            f'<figure class="view" data-view="{self.request.view}" '
            f'data-along="{html.escape(self.request.options["along"])}" '
            f'data-done="{self.view.done:.3f}">'
            f'<img alt="{caption}" src="data:image/png;base64,{source}">'
            f"<figcaption>{caption}{busy}</figcaption></figure>"
        )


class Session:
    """What one page asks for and is answered; the page gives it the setters of its states.

    Args:
        query: the address of the page: fields of a problem and options of the view.
        show_point, show_view, show_words: called, also from the threads, with a :class:`Point`, a
            :class:`Shown`, and sentences about the simulation.
        thread: makes the threads.
    """

    def __init__(
        self,
        query: Mapping[str, str | list[str]],
        *,
        show_point: Callable[[Point], None],
        show_view: Callable[[Shown], None],
        show_words: Callable[[str], None],
        thread: Callable[..., threading.Thread] = threading.Thread,
    ) -> None:
        self._show_point, self._show_view, self._show_words = show_point, show_view, show_words
        asked = {name: text if isinstance(text, str) else text[-1] for name, text in query.items()}
        self.problem, self._notice, self._telling = START.problem, "", threading.Lock()
        view = {"view": START.view, "along": START.field}
        options = Request.of(self.problem, view).options
        view |= {name: text for name, text in asked.items() if name in options}
        fields = {name: text for name, text in asked.items() if name not in options}
        if fields:
            self.problem = self._read("the address", lambda: problem_of_texts(fields))
        self.request = Request.of(self.problem, view)
        self.point = Point(self.problem)
        self.trials: dict[Problem, Trial] = {}
        self._lanes = [Lane(self._failed, thread) for _ in range(4)]
        self._quick, self._thorough, self._watch, self._training = self._lanes
        self.panel = Panel(CONTROLS, GROUPS, values_of(self.problem), self._controls_changed)
        self.options = Panel(
            option_controls(self.problem), {}, self.request.options, self._options_changed
        )
        self._look(Shown(self.problem, self.request, message=_SOLVING))
        self._ask()

    # -- what the user does ----------------------------------------------------------------------

    def choose(self, preset: str) -> None:
        """Begin again with a preset."""
        chosen = PRESETS[preset]
        up = "finetuning.samples" if chosen.field == "pretraining.penalty" else chosen.field
        axes = {"along": chosen.field, "from": "", "to": "", "x": "pretraining.penalty", "y": up}
        self._replace(chosen.problem)
        self.options.values = {**self.options.values, "view": chosen.view, **axes}

    def import_toml(self, name: str, content: bytes) -> None:
        """Show the problem in a TOML file; one that cannot be read is refused, and nothing lost."""
        problem = self._read(name, lambda: Problem.from_dict(parse_toml(content, name)))
        if self._notice:
            self._show(self.point)
        else:
            self._replace(problem)

    def _replace(self, problem: Problem) -> None:
        """Another problem in the controls; no notice is left, also where it is the same one."""
        self._notice = ""
        self.panel.values = values_of(problem)
        self._show(self.point)

    def _read(self, source: str, problem: Callable[[], Problem]) -> Problem:
        """A problem from elsewhere, or the present one and a notice why not."""
        self._notice = ""
        try:
            return problem()
        except ProblemError as error:
            self._notice = f"{source} is not shown: {error}"
            return self.problem

    def close(self) -> None:
        """End the threads."""
        for lane in self._lanes:
            lane.close()

    def _controls_changed(self, values: dict[str, str]) -> None:
        self._notice = ""
        try:
            self.problem = problem_of(values)
        except ProblemError as error:
            sentence = str(error)
            name = next((c.name for c in CONTROLS if sentence.startswith(f"{c.name} ")), "")
            self.panel.fault = {"name": name, "text": sentence}
            for lane in (self._quick, self._thorough, self._watch):
                lane.ask(None)
            self._show(Point(self.problem, message=sentence, refused=True))
            return
        self.panel.fault = {}
        controls = [control.to_dict() for control in option_controls(self.problem)]
        if controls != self.options.controls:
            self.options.controls = controls
        self._ask()

    def _options_changed(self, options: dict[str, str]) -> None:
        if options["along"] != self.request.options["along"] and (options["from"] or options["to"]):
            ends = [self.request.options[name] for name in ("from", "to")]
            if [options["from"], options["to"]] == ends:  # those of the former field
                self.options.values = {**options, "from": "", "to": ""}
                return
        former, self.request = self.request, Request.of(self.problem, options)
        if former.options["simulate"] != self.request.options["simulate"]:
            self._simulate()
        elif former.options["cancel"] != self.request.options["cancel"]:
            self._cancel()
        elif former != self.request:
            self._thorough.ask(self._refine)

    def _simulate(self) -> None:
        problem = self.problem
        try:
            if self.panel.fault:
                raise ProblemError(self.panel.fault["text"])
            dims, seeds = self.request.size()
        except ProblemError as error:
            self._show_words(f"Not simulated: {error}")
            return
        self._show_words("The simulation compiles and trains its first run …")
        self._training.ask(lambda: self._train(problem, dims, seeds))

    def _cancel(self) -> None:
        if self._training.busy:
            self._training.ask(None)
            self._show_words("Cancelled; what is shown stays.")

    # -- the work --------------------------------------------------------------------------------

    def _ask(self) -> None:
        problem = self.problem
        self._show(Point(problem, self.point.prediction, message=_SOLVING, waiting=True))
        self._watch.ask(self._reassure)
        self._quick.ask(lambda: self._coarse(problem))
        self._thorough.ask(self._refine)

    def _reassure(self) -> Iterator[None]:
        if self._watch.wait(_PATIENCE) and self.point.waiting:
            self._show(dataclasses.replace(self.point, message=_COMPILING))
        yield

    def _coarse(self, problem: Problem) -> Iterator[None]:
        found = self._predicted(problem, COARSE)
        yield
        self._watch.ask(None)
        self._show(found)

    def _refine(self) -> Iterator[None]:
        """The first, coarse view; the refined point; the rest of the view."""
        problem, request = self.problem, self.request
        if not self._thorough.wait(_REST):
            return
        steps = self._views(problem, request)
        next(steps, None)
        yield
        if not self._is_refined(problem):
            found = self._predicted(problem, FINE)
            yield
            self._show(found)
        yield from steps

    def _is_refined(self, problem: Problem) -> bool:
        return self.point.refined and self.point.problem == problem

    def _predicted(self, problem: Problem, precision: Precision) -> Point:
        try:
            return Point(problem, answer(problem, precision), refined=precision == FINE)
        except ProblemError as error:
            return Point(problem, message=str(error), refused=True)

    def _views(self, problem: Problem, request: Request) -> Iterator[None]:
        try:
            measured = self._measured() if request.along else []
            for view in request.views(problem, measured, self.trials.get(problem)):
                self._look(Shown(problem, request, view, png=_drawn(view, "png", dpi=160)))
                yield
        except ProblemError as error:
            self._look(Shown(problem, request, message=str(error)))

    def _train(self, problem: Problem, dims: tuple[int, ...], seeds: int) -> Iterator[None]:
        known, shown = 0, -math.inf
        try:
            for state in trial(problem, dims, seeds):
                if state.done > known:
                    known = state.done
                    self._show_words(f"{state.done} of {state.total} runs have ended.")
                    late = time.monotonic() - shown > _PAUSE or state.done == state.total
                    if state.comparable and late:
                        shown = time.monotonic()
                        self._learn(state)
                yield
        except (ProblemError, RuntimeError) as error:
            self._show_words(f"The simulation stopped: {error}")

    def _learn(self, state: Trial) -> None:
        """Keep a trial in the place of the last one of its problem, and show it."""
        self.trials.pop(state.problem, None)
        self.trials[state.problem] = state
        for oldest in list(self.trials)[:-_KEPT_TRIALS]:
            del self.trials[oldest]
        if self.request.shows_trials:
            self._thorough.ask(self._refine)

    def _measured(self) -> list[Measured]:
        """Trials beside their theory, where it does not refuse them."""
        found = []
        for state in list(self.trials.values()):
            theory = self._predicted(state.problem, FINE).prediction
            if theory is not None:
                runs = {dim: pd.DataFrame(rows) for dim, rows in state.runs.items()}
                found.append(Measured(state.problem, state.dims, agreements(theory, runs)))
        return found

    # -- what the page is told -------------------------------------------------------------------

    def _show(self, point: Point) -> None:
        """Tell the page, unless the controls have moved on, are refused, or it knows better."""
        with self._telling:
            coarse = not (point.refined or point.waiting or point.refused)
            late = point.problem != self.problem or (coarse and self._is_refined(point.problem))
            if late or (self.panel.fault and not point.refused):
                return
            self.point = dataclasses.replace(point, notice=self._notice)
            self._show_point(self.point)

    def _look(self, shown: Shown) -> None:
        self.shown = shown
        self._show_view(shown)

    def _failed(self, error: Exception) -> None:
        traceback.print_exception(error)
        words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        self._notice = f"This failed, which is a bug of the explorer; please report it. {words}"
        self._show(self.point)

    # -- what the user takes away ----------------------------------------------------------------

    def address(self) -> dict[str, str]:
        """What brings this page back."""
        return {**address(self.problem), **self.request.address(self.problem)}

    def pdf(self) -> bytes:
        """The figure in vector graphics, without a date; nothing where there is none."""
        view = self.shown.view
        return _drawn(view, "pdf", metadata={"CreationDate": None}) if view else b""

    def png(self) -> bytes:
        """The picture on the page."""
        return self.shown.png

    def csv(self) -> bytes:
        """The table that the figure is drawn from, all digits."""
        view = self.shown.view
        return view.table.to_csv(index=False).encode() if view else b""

    def toml(self) -> bytes:
        """The problem."""
        return self.problem.to_toml().encode()

    def recipes(self) -> str:
        """TOML, command and program of what is shown, as HTML."""
        shown = self.shown
        parts = {"Problem (TOML)": self.problem.to_toml()}
        try:
            recipe = shown.request.recipe(shown.problem, shown.view)
            parts |= {"Command": recipe.shell(), "Python": recipe.program()}
        except ProblemError as error:
            parts["Command"] = parts["Python"] = str(error)
        texts = "".join(
            f"<details><summary>{title}</summary><pre>{html.escape(text)}</pre></details>"
            for title, text in parts.items()
        )
        return f'<div class="take-away">{texts}</div>'


def _drawn(view: View, form: str, **options: Any) -> bytes:
    with _DRAWING, io.BytesIO() as file:
        view.draw().savefig(file, format=form, **options)
        return file.getvalue()
