"""From events to actions to pictures: one way round for the whole page.

An event calls an action, the action changes the session, and every component whose named values changed is drawn again.
A component is registered once with `show`; what depends on the same values is thereby linked.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from workbench import tuning
from workbench.options import BadInput, first_line
from workbench.ui.session import TICK_S, Session, Store

log = logging.getLogger("workbench.ui")


@dataclass(frozen=True)
class Binding:
    """A component drawn from the session whenever one of the named values changed."""

    component: Any
    depends: tuple[str, ...]
    draw: Callable[[Session], Any]

    def key(self, session: Session) -> tuple[int, ...]:
        return tuple(session.rev[name] for name in self.depends)


@dataclass(frozen=True)
class Listener:
    event: Callable
    action: Callable
    inputs: tuple
    tab: str
    with_payload: bool
    options: dict


class Screens(gr.Blocks):
    """Blocks in which an output that an event leaves alone costs nothing. Gradio makes every output's component anew, of the untouched
    ones too, and whatever computes in this process waits for that."""

    async def postprocess_data(self, block_fn, predictions, state):
        if not isinstance(predictions, list):
            return await super().postprocess_data(block_fn, predictions, state)
        untouched = gr.skip()
        places = [i for i, value in enumerate(predictions) if not (isinstance(value, dict) and value == untouched)]
        few = copy.copy(block_fn)
        few.outputs, values = [block_fn.outputs[i] for i in places], [predictions[i] for i in places]
        made = await super().postprocess_data(few, values[0] if len(values) == 1 else values, state) if places else []
        sent = dict(zip(places, made))
        return [sent.get(i, untouched) for i in range(len(predictions))]


class Page:
    """Collects what is shown and what is listened to; `bind` connects them once all screens are laid out."""

    def __init__(self, store: Store):
        self.store = store
        self.session_id = gr.State("")
        self.seen = gr.State({})
        self.timer = gr.Timer(TICK_S, active=True)
        self.on_open: Callable[[Session, str], None] = lambda session, link: None  # `link` is what follows ?plan=
        self.bindings: list[Binding] = []
        self.listeners: list[Listener] = []

    def show(self, component, depends: Sequence[str], draw: Callable[[Session], Any]):
        self.bindings.append(Binding(component, tuple(depends), draw))
        return component

    def on(self, event: Callable, action: Callable, inputs: Sequence = (), *, tab: str, with_payload: bool = False, **options) -> None:
        """Call action(session, *inputs), or action(session, payload, *inputs), and draw what changed. A BadInput becomes `tab`'s line."""
        self.listeners.append(Listener(event, action, tuple(inputs), tab, with_payload, options))

    def bind(self, demo: gr.Blocks, kept_id: gr.BrowserState) -> None:
        outputs = [self.session_id, self.seen, *(binding.component for binding in self.bindings)]
        # One event at a time: a tick that was drawn before a click must not arrive after it. Each takes milliseconds; what takes
        # longer is a job, or goes off the request with `Session.soon`.
        # Gradio's page writes an event's status into every output, and copies its value to do so, which takes longer than drawing. Here
        # the status goes to the timer, which is not drawn.
        shared = {"api_visibility": "private", "show_progress": "hidden", "show_progress_on": self.timer, "concurrency_limit": 1,
                  "concurrency_id": "page"}

        def open_page(session_id, request: gr.Request):
            session = self.store.open(session_id if isinstance(session_id, str) else "")
            self._told(session, "model", self.on_open, str(request.query_params.get("plan", "")))
            return [session.id, *self.refresh(session, {})]

        def tick(session_id, seen):
            if not session_id:  # the page is still loading and has no session yet
                return [gr.skip()] * len(outputs)
            return self.refresh(self.store.open(session_id), seen)

        demo.load(open_page, [kept_id], [kept_id, *outputs], **shared)
        self.timer.tick(tick, [self.session_id, self.seen], outputs, trigger_mode="once", **shared)
        for listener in self.listeners:
            listener.event(self._handler(listener), [self.session_id, self.seen, *listener.inputs], outputs,
                           **shared, **listener.options)

    def _handler(self, listener: Listener) -> Callable:
        def act(session_id, seen, *values):
            session = self.store.open(session_id)
            session.notify(listener.tab)
            with tuning.single_threaded():
                self._told(session, listener.tab, listener.action, *values)
            return self.refresh(session, seen)

        def act_on_payload(event: gr.EventData, session_id, seen, *values):
            return act(session_id, seen, event._data, *values)

        return act_on_payload if listener.with_payload else act

    @staticmethod
    def _told(session: Session, tab: str, action: Callable, *values) -> None:
        """Call action(session, *values); what goes wrong becomes `tab`'s line, and the page is drawn all the same."""
        try:
            action(session, *values)
        except BadInput as error:
            session.notify(tab, str(error))
        except Exception as error:
            log.exception("%s failed", getattr(action, "__name__", "an action"))
            session.notify(tab, f"{type(error).__name__}: {first_line(error)}")

    def refresh(self, session: Session, seen: dict) -> list:
        """The session's id, the new `seen`, then one value per component: its picture if it changed, else nothing."""
        with session.lock, tuning.single_threaded():
            session.sync()
            keys = {number: (session.id, *binding.key(session)) for number, binding in enumerate(self.bindings)}
            values = [gr.skip() if seen.get(number) == keys[number] else binding.draw(session)
                      for number, binding in enumerate(self.bindings)]
        return [session.id, keys if keys != seen else gr.skip(), *values]
