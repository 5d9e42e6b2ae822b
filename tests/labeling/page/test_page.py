"""The labelling page in a real browser: by keyboard, by drag, by touch; drafts, undo, and text that is no markup."""

from __future__ import annotations

import itertools
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import LabelSection
from rlhf.data.records import Prompt
from rlhf.labeling.outputs import Outputs
from rlhf.labeling.page.form import Submission
from rlhf.labeling.page.server import serving
from rlhf.labeling.page.store import LabelStore, task_key
from support import label_stores
from support.browser import started, violations

MARKUP = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'><b>bold</b>"
ARABIC = "أعلى جبل في اسكتلندا هو بن نيفيس."
TALK = "Human: What is the highest mountain in Wales?\n\nAssistant: Yr Wyddfa.\n\nHuman: And in Scotland?\n\nAssistant:"
ITEMS = [
    Outputs(Prompt.from_text(TALK), ("Ben Nevis.", MARKUP, ARABIC, "Snowdon, I"), (True, True, True, False)),
    Outputs(
        Prompt.from_text("Write to Mrs Alder that her parcel is with us and that we are in after six.", "generation"),
        (
            "Dear Mrs Alder, your parcel is with us. We are in after six, so come by whenever it suits you.",
            "Hello! A parcel came for you and we took it in. Parcels are a wonderful way to send things, and we are"
            " glad to take them in, as neighbours do. Please come after six.",
            "Mrs Alder,\n\nyour parcel was returned to the post office.",
            "Your parcel is with us; we are at home after six. Your parcel is with us; we are",
        ),
        (True, True, True, False),
    ),
    Outputs(Prompt.from_text("Name a river."), ("The Severn.", "Thames", "A river is water."), (True,) * 3),
    Outputs(Prompt.from_text("Is tea good?"), ("Yes.", "No.", "It is a drink.", "For whom?", "4"), (True,) * 5),
    Outputs(Prompt.from_text("What is rain?"), ("Water that falls from clouds.", "Wet."), (True,) * 2),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with started() as browser:
        yield browser


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Callable[..., tuple[LabelStore, str]]]:
    """Return a function that starts a server: site(labelers, **label) returns its store and address."""
    stack = []

    def start(names: tuple[str, ...] = ("anna",), items: list[Outputs] = ITEMS, **label: Any) -> tuple[LabelStore, str]:
        store = label_stores.opened(tmp_path, names=names, items=items, labelers=list(names), **label)
        server = serving(store, "demo", "127.0.0.1")
        stack.append((server, store))
        return store, server.__enter__()

    yield start
    for server, store in stack:
        server.__exit__(None, None, None)
        store.close()


def opened(browser: Any, store: LabelStore, address: str, name: str = "anna", **context: Any) -> Any:
    """Return a labeler's page with the first prompt, in a browser context of its own; it collects its errors."""
    page = browser.new_context(**{"viewport": {"width": 1440, "height": 900}} | context).new_page()
    page.set_default_timeout(15000)
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("dialog", lambda dialog: page.errors.append(f"dialog: {dialog.message}"))
    page.goto(f"{address}#{store.new_token(name)}")
    page.wait_for_selector(".card")
    return page


def shown(page: Any) -> list[str]:
    """Return the outputs' texts in the order of the page."""
    return [card.inner_text() for card in page.locator(".card > .text").all()]


def ranks_by_text(store: LabelStore, labeler: str = "anna") -> dict[str, dict[str, int]]:
    """Return the stored rankings as {prompt: {response: rank}}."""
    mine = [item for item in store.rankings() if item.labeler == labeler]
    return {each.outputs.prompt.text: dict(zip(each.outputs.responses, each.ranks, strict=True)) for each in mine}


def place_by_keys(page: Any, rows: list[int]) -> None:
    """Rank the outputs in the order shown, starting with the focus on the prompt."""
    for row in rows:
        page.keyboard.press("j")
        page.keyboard.press(str(row))


def wait_stored(page: Any, store: LabelStore, n: int) -> None:
    """Wait until n rankings are in and the page shows that."""
    page.wait_for_function("n => document.getElementById('progress').value === n", arg=n)
    assert len(store.rankings()) == n


def drag(page: Any, i: int, target: Any, height: float = 0.5) -> None:
    """Drag the chip of output i onto an element, at a share of its height."""
    chip = page.locator(f".chip[data-output='{i}'] .grip")
    chip.scroll_into_view_if_needed()
    start, end = chip.bounding_box(), target.bounding_box()
    page.mouse.move(start["x"] + start["width"] / 2, start["y"] + start["height"] / 2)
    page.mouse.down()
    x, y = end["x"] + end["width"] / 2, end["y"] + end["height"] * height
    page.mouse.move(x - 40, y, steps=3)
    page.mouse.move(x, y, steps=3)
    page.mouse.up()


def row(page: Any, n: int) -> Any:
    return page.locator(f".row[data-row='{n}']")


def summary(page: Any) -> str:
    """Return the order that the page shows, without the hint of what is missing."""
    return page.evaluate("document.getElementById('summary').firstChild.textContent")


# --- ranking ---------------------------------------------------------------------------------------------------------


def test_five_prompts_by_keyboard_alone_with_ties_and_a_reload(browser: Any, site: Any) -> None:
    store, address = site(quality="optional")
    page = opened(browser, store, address)
    typed = {4: [2, 1, 1, 4], 3: [3, 3, 1], 5: [2, 1, 2, 5, 1], 2: [1, 1]}
    dense = {4: [2, 1, 1, 3], 3: [2, 2, 1], 5: [2, 1, 2, 3, 1], 2: [1, 1]}  # rows without their empty ones
    expected = []
    for n in range(5):
        texts = shown(page)
        k = len(texts)
        place_by_keys(page, typed[k])
        if n == 2:
            page.keyboard.press("Shift+Digit6")  # the quality of the last one
            page.reload()
            page.wait_for_selector(".card")
            assert shown(page) == texts and summary(page) == "C › A = B"
        expected.append(dict(zip(texts, dense[k], strict=True)))
        page.keyboard.press("Control+Enter")
        wait_stored(page, store, n + 1)
    assert list(ranks_by_text(store).values()) == expected
    assert store.rankings()[2].details["quality"].count(6) == 1
    page.wait_for_selector("#end:not([hidden])")
    assert page.inner_text("#end-title") == "All rankings are in"
    assert page.evaluate("document.activeElement.id") == "end-title" and page.errors == []


def test_five_prompts_by_drag_with_ties_and_a_reload(browser: Any, site: Any) -> None:
    store, address = site()
    page = opened(browser, store, address)
    expected = []
    for n in range(5):
        texts = shown(page)
        k = len(texts)
        if k == 4:
            drag(page, 0, row(page, 1))
            drag(page, 1, row(page, 1))  # a tie
            drag(page, 2, row(page, 1), 0.02)  # above both: they move down
            assert summary(page) == "C › A = B"
            drag(page, 3, row(page, 2), 0.97)  # below them
            order = [2, 2, 1, 3]
        elif k == 3:
            for i in range(3):
                drag(page, i, row(page, 3 - i))
            drag(page, 1, page.locator("#tray-box"))
            assert summary(page) == "C › A"
            page.reload()
            page.wait_for_selector(".card")
            assert summary(page) == "C › A"
            drag(page, 1, row(page, 3))  # where A is
            order = [2, 2, 1]
        elif k == 5:
            for i in range(5):
                drag(page, i, row(page, i + 1))
            drag(page, 4, row(page, 1), 0.98)  # between two of five full rows
            assert summary(page) == "A › E › B › C › D"
            order = [1, 3, 4, 5, 2]
        else:
            card = page.locator(".card .grip").nth(1)  # the letter on the text itself can be dragged, too
            card.scroll_into_view_if_needed()
            start, end = card.bounding_box(), row(page, 1).bounding_box()
            page.mouse.move(start["x"] + 9, start["y"] + 9)
            page.mouse.down()
            page.mouse.move(end["x"] + 60, end["y"] + 15, steps=5)
            page.mouse.up()
            drag(page, 0, row(page, 2))
            order = [2, 1]
        expected.append(dict(zip(texts, order, strict=True)))
        page.click("#submit")
        wait_stored(page, store, n + 1)
    assert list(ranks_by_text(store).values()) == expected and page.errors == []


def test_by_touch_on_a_phone(browser: Any, site: Any) -> None:
    store, address = site(items=ITEMS[2:3])
    page = opened(browser, store, address, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    texts = shown(page)
    touch = page.context.new_cdp_session(page)

    def send(kind: str, *points: tuple[float, float]) -> None:
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y} for x, y in points]})

    row(page, 2).scroll_into_view_if_needed()
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    for i, n in ((2, 1), (0, 2), (1, 2)):
        grip, target = page.locator(f".chip[data-output='{i}'] .grip").bounding_box(), row(page, n).bounding_box()
        x, y = grip["x"] + 15, grip["y"] + 15
        send("touchStart", (x, y))
        for share in (0.3, 0.7, 1.0):
            send("touchMove", (x + 40 * share, y + (target["y"] + target["height"] / 2 - y) * share))
        send("touchEnd")
    assert summary(page) == "C › A = B"
    page.locator(".card").nth(1).get_by_label("Rank 3").check(force=True)  # by the buttons of the output itself
    assert summary(page) == "C › A › B"
    page.click("#submit")
    wait_stored(page, store, 1)
    assert ranks_by_text(store)["Name a river."] == dict(zip(texts, [2, 3, 1], strict=True)) and page.errors == []


def test_two_labelers_at_once(browser: Any, site: Any) -> None:
    store, address = site(("anna", "ben"), overlap=0.4)  # two of the five are shared
    pages = {name: opened(browser, store, address, name) for name in ("anna", "ben")}
    tokens = {name: page.url for name, page in pages.items()}
    assert tokens["anna"] != tokens["ben"] and "ben" in pages["ben"].inner_text("#who")
    done = 0
    while done < 7:
        for page in pages.values():
            if page.locator("#work").is_visible():
                place_by_keys(page, [1] * len(shown(page)))
                page.keyboard.press("Control+Enter")
                done += 1
                page.wait_for_function("() => !document.getElementById('submit').disabled")
    each = [(item.outputs.prompt.text, item.labeler) for item in store.rankings()]
    assert len(each) == len(set(each)) == 7 and store.counts().complete
    assert {name for _, name in each} == {"anna", "ben"}
    orders = {}
    for item in store.rankings():
        orders.setdefault(item.outputs.prompt.text, []).append(item.details["shown"])
    assert sorted(map(len, orders.values())) == [1, 1, 1, 2, 2]


def test_one_labeler_in_two_windows_is_told(browser: Any, site: Any) -> None:
    store, address = site()
    one = opened(browser, store, address)
    two = opened(browser, store, address)
    assert shown(one) == shown(two)
    for page in (one, two):
        place_by_keys(page, [1] * 4)
    one.keyboard.press("Control+Enter")
    wait_stored(one, store, 1)
    two.keyboard.press("Control+Enter")
    two.wait_for_function("() => document.getElementById('alert').textContent.includes('another window')")
    assert len(store.rankings()) == 1 and shown(two) == shown(one)


# --- model text ------------------------------------------------------------------------------------------------------


def test_model_text_is_text_and_right_to_left_reads_so(browser: Any, site: Any) -> None:
    prompt = Outputs(Prompt.from_text(f"Repeat: {MARKUP}"), (MARKUP, ARABIC, "plain"), (True, True, False))
    store, address = site(items=[prompt])
    page = opened(browser, store, address)
    assert sorted(shown(page)) == sorted([MARKUP, ARABIC, "plain"])
    assert page.inner_text("#messages") == f"Repeat: {MARKUP}"
    assert page.locator("main img, main script, main b:not(.number b)").count() == 0
    assert page.locator(f".snippet:text-is({json.dumps(MARKUP)})").count() == 1
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None and page.errors == []
    by_text = "all => Object.fromEntries(all.map(e => [e.textContent, getComputedStyle(e).direction]))"
    directions = page.eval_on_selector_all(".card > .text", by_text)
    assert directions == {MARKUP: "ltr", ARABIC: "rtl", "plain": "ltr"}
    cut = page.locator(".card", has_text="cut off at the length limit")
    assert cut.count() == 1 and "plain" in cut.inner_text()


def test_a_script_that_gets_into_the_page_would_not_run(browser: Any, site: Any) -> None:
    store, address = site()
    page = opened(browser, store, address)
    page.evaluate(
        """() => { document.body.insertAdjacentHTML('beforeend', '<img src="x" onerror="window.hacked = 1">');
                   const s = document.createElement('script'); s.textContent = 'window.hacked = 1';
                   document.body.append(s); }"""
    )
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None


# --- undo, take back, skip, and a server that is gone ----------------------------------------------------------------


def test_undo_take_back_and_skip(browser: Any, site: Any) -> None:
    store, address = site(items=ITEMS[2:])
    page = opened(browser, store, address)
    page.keyboard.press("Control+Enter")
    assert page.inner_text("#alert") == "Output A has no rank yet." and store.rankings() == []
    page.keyboard.press("2")  # the focus has gone to A
    page.keyboard.press("j")
    page.keyboard.press("1")
    assert summary(page) == "B › A"
    page.keyboard.press("Control+z")
    assert summary(page) == "A"
    page.click("#undo")
    assert summary(page) == "" and page.locator("#undo").is_disabled()
    first = shown(page)
    page.focus("#prompt")
    place_by_keys(page, [1, 2, 2])
    page.keyboard.press("Control+Enter")
    wait_stored(page, store, 1)

    second = shown(page)
    page.focus("#prompt")
    place_by_keys(page, [3])  # begun; it waits while the last one is mended
    page.click("#back")
    page.wait_for_function("() => document.getElementById('live').textContent.startsWith('Taken back')")
    assert shown(page) == first and summary(page) == "A › B = C" and store.rankings() == []
    page.locator(".card").first.focus()
    page.keyboard.press("2")
    page.keyboard.press("Control+Enter")
    wait_stored(page, store, 1)
    assert ranks_by_text(store) == {"Name a river.": dict(zip(first, [1, 1, 1], strict=True))}
    assert shown(page) == second and summary(page) == "A"

    page.click("#skip")
    page.get_by_label("I do not know enough to judge").check()
    page.fill("#note", "chemistry")
    page.click("#skip-yes")
    page.wait_for_function("() => document.getElementById('live').textContent === 'Skipped.'")
    assert store.skips() == {"expertise": 1}
    page.wait_for_function("() => document.querySelectorAll('.card').length === 2")
    page.click("#skip")
    page.keyboard.press("Escape")
    assert page.locator("#skip-dialog").is_hidden() and store.skips() == {"expertise": 1}


def test_flags_and_quality_by_keyboard_are_stored(browser: Any, site: Any) -> None:
    store, address = site(items=ITEMS[4:], quality="required")
    page = opened(browser, store, address)
    texts = shown(page)
    place_by_keys(page, [1, 2])
    page.keyboard.press("Control+Enter")
    assert page.inner_text("#alert") == "Output A has no quality yet."
    page.keyboard.press("Shift+Digit7")
    page.keyboard.press("f")
    page.keyboard.press("Space")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    page.locator(".card").nth(1).focus()
    page.keyboard.press("Shift+Digit1")
    page.keyboard.press("Control+Enter")
    wait_stored(page, store, 1)
    (item,) = store.rankings()
    about = zip(item.details["quality"], item.details["flags"], strict=True)
    said = dict(zip(item.outputs.responses, about, strict=True))
    assert said == {texts[0]: (7, ["fails_task", "hallucination"]), texts[1]: (1, [])}


def test_a_ranking_that_meets_a_dead_server_is_stored_once_it_is_back(browser: Any, tmp_path: Path) -> None:
    store = label_stores.opened(tmp_path, items=ITEMS)
    with serving(store, "demo", "127.0.0.1") as address:
        page = opened(browser, store, address)
        place_by_keys(page, [1, 2, 3, 4])
    page.keyboard.press("Control+Enter")
    page.wait_for_function("() => document.getElementById('alert').textContent.startsWith('Not stored yet')")
    assert page.locator("#submit").is_disabled() and store.rankings() == []
    with serving(store, "demo", "127.0.0.1") as again:
        assert again == address
        wait_stored(page, store, 1)
        assert page.inner_text("#alert") == ""
        place_by_keys(page, [1] * len(shown(page)))
    page.keyboard.press("Control+Enter")
    page.wait_for_function("() => document.getElementById('alert').textContent.startsWith('Not stored yet')")
    context, url = page.context, page.url
    page.close()  # with the submission in the browser's storage alone
    with serving(store, "demo", "127.0.0.1"):
        page = context.new_page()
        page.goto(url)
        page.wait_for_function("() => document.getElementById('progress').value === 2")
        assert len(store.rankings()) == 2
        assert not [name for name in page.evaluate("() => Object.keys(localStorage)") if name.startswith("outbox")]
        # An acknowledgement that was lost: the same submission is sent again, and the page goes on.
        sent = store.rankings()[-1]
        query = "SELECT claims.id FROM claims JOIN submissions s USING (task) WHERE s.id = ?"
        claim = store._read(query, sent.details["id"])
        again = {"id": sent.details["id"], "task": claim[0]["id"], "kind": "ranking"}
        again |= {"ranks": [1] * len(sent.ranks), "flags": [[]] * len(sent.ranks)}
        page.evaluate("kept => localStorage.setItem(`outbox anna ${kept.id}`, JSON.stringify(kept))", again)
        page.reload()
        page.wait_for_selector(".card")
        assert len(store.rankings()) == 2 and page.inner_text("#alert") == ""
        assert not [name for name in page.evaluate("() => Object.keys(localStorage)") if name.startswith("outbox")]


def test_prompts_of_another_run_are_kept_until_served_or_thrown_away(browser: Any, tmp_path: Path) -> None:
    """Two runs at one address with the same prompts and labeler, shown in different orders."""
    stores = [LabelStore(tmp_path / f"{n}.sqlite", LabelSection(), n) for n in (1, 2)]
    tokens = []
    for store in stores:
        store.set_tasks(ITEMS)
        store.invite(["anna"])
        tokens.append(store.new_token("anna"))
    waiting = "() => Object.keys(localStorage).filter(name => name.startsWith('outbox')).length"
    with serving(stores[0], "first", "127.0.0.1") as address:
        port = int(address.rstrip("/").rpartition(":")[2])
        page = opened(browser, stores[0], address)
        url, texts = page.url, shown(page)
        place_by_keys(page, [1, 2, 3, 4])
    page.keyboard.press("Control+Enter")
    page.wait_for_function("() => document.getElementById('alert').textContent.startsWith('Not stored yet')")
    context = page.context
    page.close()
    with serving(stores[1], "second", "127.0.0.1", port):
        page = context.new_page()
        page.goto(f"{address}#{tokens[1]}")
        page.wait_for_selector("#kept li")
        assert "Run first" in page.inner_text("#kept-list") and "A › B › C › D" in page.inner_text("#kept-list")
        assert page.evaluate(waiting) == 1 and stores[1].rankings() == []
        assert summary(page) == ""  # the draft is not this run's either
        assert violations(page) == []
        place_by_keys(page, [1] * len(shown(page)))
        page.keyboard.press("Control+Enter")
        wait_stored(page, stores[1], 1)
        assert page.evaluate(waiting) == 1
        page.close()
    with serving(stores[0], "first", "127.0.0.1", port):
        page = context.new_page()
        page.goto(url)
        wait_stored(page, stores[0], 1)
        assert ranks_by_text(stores[0])[ITEMS[0].prompt.text] == dict(zip(texts, [1, 2, 3, 4], strict=True))
        assert page.evaluate(waiting) == 0 and page.locator("#kept").is_hidden()
        # As an earlier version of the page left it, under the hash of the task.
        left = {"id": str(uuid.uuid4()), "task": task_key(ITEMS[1]), "kind": "ranking", "ranks": [1, 2, 3, 4]}
        page.evaluate("left => localStorage.setItem(`outbox anna ${left.id}`, JSON.stringify(left))", left)
        page.reload()
        page.click("#kept li button")
        assert page.locator("#kept").is_hidden() and page.evaluate(waiting) == 0
        assert len(stores[0].rankings()) == 1
    for store in stores:
        store.close()


def test_a_server_that_stays_away_is_told_from_one_that_starts_again(browser: Any, tmp_path: Path) -> None:
    store = label_stores.opened(tmp_path, items=ITEMS)
    with serving(store, "demo", "127.0.0.1") as address:
        page = browser.new_context().new_page()
        page.clock.install()
        page.goto(f"{address}#{store.new_token('anna')}")
        page.wait_for_selector(".card")
        place_by_keys(page, [1] * len(shown(page)))
    page.keyboard.press("Control+Enter")
    told = "words => document.getElementById('alert').textContent.includes(words)"
    page.wait_for_function(told, arg="does not answer; trying again")
    page.clock.fast_forward(61000)
    page.wait_for_function(told, arg="your answer is kept in this browser. The server has not answered for a minute")
    assert "the run may have gone on" in page.inner_text("#alert")
    store.close()


def test_who_is_at_a_prompt_when_all_is_in_is_told(browser: Any, site: Any) -> None:
    store, address = site(("anna", "ben"), ITEMS[:2], overlap=0, rankings=1)
    page = browser.new_context().new_page()
    page.clock.install()
    page.goto(f"{address}#{store.new_token('anna')}")
    page.wait_for_selector(".card")
    place_by_keys(page, [1])
    bens = store.next_task("ben")
    ranks = list(range(1, len(bens.outputs) + 1))
    store.submit("ben", Submission(id=str(uuid.uuid4()), task=bens.id, kind="ranking", ranks=ranks))
    page.clock.fast_forward(15001)
    page.wait_for_function("() => document.getElementById('alert').textContent.startsWith('All rankings that the run')")
    page.keyboard.press("Control+z")  # nothing is begun any more
    page.clock.fast_forward(15001)
    page.wait_for_selector("#end:not([hidden])")
    assert page.inner_text("#end-title") == "All rankings are in" and page.inner_text("#alert") == ""


def test_a_link_that_is_no_good_is_told(browser: Any, site: Any) -> None:
    _, address = site()
    page = browser.new_context().new_page()
    page.goto(address)
    page.wait_for_function("() => document.getElementById('alert').textContent.startsWith('Open the link')")
    page.goto(f"{address}#guess")
    page.wait_for_function("() => document.getElementById('alert').textContent.startsWith('this link is not valid')")
    assert page.locator(".card").count() == 0


# --- for everybody ---------------------------------------------------------------------------------------------------


def test_changes_are_spoken_and_the_focus_stays(browser: Any, site: Any) -> None:
    store, address = site(items=ITEMS[3:4])
    page = opened(browser, store, address)
    assert page.evaluate("document.activeElement.id") == "prompt"

    def heard(words: str) -> None:
        page.wait_for_function("words => document.getElementById('live').textContent === words", arg=words)

    assert page.get_attribute("#live", "aria-live") == "polite"
    place_by_keys(page, [1])
    heard("Output A: rank 1 of 1.")
    place_by_keys(page, [1])
    heard("Output B: rank 1 of 1, tied with A.")
    chip = page.locator(".chip[data-output='1']")
    chip.focus()
    page.keyboard.press("ArrowDown")  # out of the tie
    heard("Output B: rank 2 of 2.")
    page.keyboard.press("5")
    heard("Output B: rank 2 of 2.")
    for _ in range(4):
        page.keyboard.press("ArrowUp")
    heard("Output B: rank 1 of 1, tied with A.")
    page.keyboard.press("ArrowUp")
    heard("Output B: rank 1 of 2.")
    assert page.evaluate("document.activeElement.dataset.output") == "1"
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Output B: rank 1 of 2."
    page.keyboard.press("Backspace")
    heard("Output B: not ranked.")
    # Arrow keys on the rank buttons of an output move it as well, and the focus stays on them.
    radio = page.locator(".card").nth(2).get_by_label("Rank 1")
    radio.focus()
    page.keyboard.press("Space")
    page.keyboard.press("ArrowRight")
    heard("Output C: rank 1 of 1, tied with A.")
    page.keyboard.press("ArrowRight")
    heard("Output C: rank 2 of 2.")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Rank 3"
    # Everything is reached by Tab, and single keys do nothing outside the outputs and the board.
    page.focus("#submit")
    before = summary(page)
    page.keyboard.press("1")
    page.keyboard.press("j")
    assert summary(page) == before and page.evaluate("document.activeElement.id") == "submit"


SIZES = [(width, scheme) for width in (390, 1440) for scheme in ("light", "dark")]


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_nothing_serious_for_axe_and_nothing_beside_the_screen(browser, site, width: int, scheme: str) -> None:
    """Draw the pictures of docs/ into FOLDER with RLHF_SCREENSHOTS=FOLDER."""
    earlier = [Outputs(Prompt.from_text(f"Say {n}."), ("One.", "Two."), (True, True)) for n in range(7)]
    store, address = site(items=earlier + ITEMS)
    for _ in earlier:
        given = {"id": str(uuid.uuid4()), "task": store.next_task("anna").id, "kind": "ranking", "ranks": [1, 2]}
        store.submit("anna", Submission(seconds=52, **given))
    phone = {"has_touch": True, "is_mobile": True} if width < 500 else {}
    page = opened(browser, store, address, viewport={"width": width, "height": 900}, color_scheme=scheme, **phone)
    assert page.inner_text("#pace") == "7 by you · 7 of 12 in all · 1.2 a minute · about 4 min left"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 384) is (scheme == "dark")

    def check(state: str) -> None:
        assert violations(page) == [], state
        assert page.evaluate("document.documentElement.scrollWidth") <= width, state
        small = page.eval_on_selector_all(
            "button, .mark, summary, #reasons label, .flags label",
            "all => all.filter(e => e.offsetParent && e.getBoundingClientRect().height < 24).map(e => e.outerHTML)",
        )
        assert small == [], state

    check("a dialogue, nothing ranked")
    place_by_keys(page, [1] * 4)
    page.keyboard.press("Control+Enter")
    wait_stored(page, store, 8)
    for i, text in enumerate(shown(page)):
        for start, row_keys in {"Dear": "1", "Hello": "2", "Your": "2"}.items():
            if text.startswith(start):
                page.locator(".card").nth(i).focus()
                page.keyboard.press(row_keys)
                page.keyboard.press("Shift+Digit6" if start == "Dear" else "Shift+Digit4")
    if folder := os.environ.get("RLHF_SCREENSHOTS"):
        page.evaluate("window.scrollTo(0, 0)")
        page.screenshot(path=f"{folder}/label-{width}-{scheme}.png")
    check("half ranked")
    for i in range(4):
        page.locator(".card details").nth(i).evaluate("e => e.open = true")
    page.evaluate("document.getElementById('help').open = true")
    check("everything open")
    page.click("#skip")
    check("the dialog")
    page.keyboard.press("Escape")
    page.keyboard.press("Control+Enter")  # to the output without a rank
    page.keyboard.press("4")
    for n in range(9, 13):
        page.keyboard.press("Control+Enter")
        wait_stored(page, store, n)
        if n < 12:
            place_by_keys(page, [1] * len(shown(page)))
    page.wait_for_selector("#end:not([hidden])")
    check("the end")


# --- the arithmetic of the board, against a slow reading of its rules ------------------------------------------------


def test_inserting_between_rows_keeps_the_others_order(browser: Any, site: Any) -> None:
    """Return all boards of three outputs, and those of four without a tray."""
    store, address = site()
    page = opened(browser, store, address)
    boards = [list(b) for b in itertools.product([None, 1, 2, 3], repeat=3)]
    boards += [list(b) for b in itertools.product([1, 2, 3, 4], repeat=4)]
    cases = [(b, i, gap) for b in boards for i in range(len(b)) for gap in range(len(b) + 1)]
    insert = "async all => { const m = await import('/order.js'); return all.map(([b, i, g]) => m.insert(b, i, g)); }"
    results = page.evaluate(insert, cases)
    for (before, i, gap), after in zip(cases, results, strict=True):
        others = [j for j in range(len(before)) if j != i]
        assert all(row is None or 1 <= row <= len(before) for row in after)
        assert after[i] is not None and all(after[j] != after[i] for j in others)  # a row of its own
        for j in others:
            assert (after[j] is None) == (before[j] is None)
            if before[j] is not None:
                assert (after[j] < after[i]) == (before[j] <= gap), (before, i, gap, after)
        for a, b in itertools.combinations([j for j in others if before[j] is not None], 2):
            assert (before[a] < before[b], before[a] == before[b]) == (after[a] < after[b], after[a] == after[b])


@pytest.mark.parametrize(
    ("place", "dense", "words"),
    [
        ([2, 4, 2, 1], [2, 3, 2, 1], "D › A = C › B"),
        ([3, None, 3], [1, None, 1], "A = C"),
        ([None, None], [None, None], ""),
    ],
)
def test_ranks_and_words_by_hand(browser: Any, site: Any, place: list, dense: list, words: str) -> None:
    store, address = site()
    page = opened(browser, store, address)
    told = "async place => { const m = await import('/order.js'); return [m.ranks(place), m.words(place)]; }"
    assert page.evaluate(told, place) == [dense, words]
