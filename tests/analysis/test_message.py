"""The message about a night: short, inert, and sent only where it is asked
for; URLs stay secret.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from markdown_it import MarkdownIt

from afn_ray.analysis import learned, notify, services
from afn_ray.analysis.audit import Audit
from afn_ray.analysis.baselines import Baseline
from afn_ray.analysis.learned import UsualRange
from afn_ray.analysis.limits import Limit
from afn_ray.analysis.message import MOST_ANSWER_CHARS, MOST_PAGE_CHARS, Message, inert, message
from afn_ray.analysis.standing import Standing
from afn_ray.analysis.verdict import Rule
from afn_ray.errors import ConfigError
from afn_ray.reduce.compare import Comparison
from afn_ray.reduce.losses import Losses
from afn_ray.schema import CLASS_DRIFT_SCHEMA, DRIFT_SCHEMA, MOVERS_SCHEMA
from afn_ray.store.manifest import RunFolder
from afn_ray.store.verdicts import Acceptance
from nights import Nights, listening, strictly

EVIL = (
    "<!channel> @everyone [x](http://evil.example/y) **b** _i_ `c` ~~s~~ | # h &lt; "
    "www.evil.example\n\n# top \u202e"
)
PAGE = "https://pages.example/audit/report.html"


def mover(text: str, status: str, at: int, **columns: Any) -> dict[str, Any]:
    both = {"share_high_a": 0.094, "share_high_b": 0.353, "q": 0.001}
    return {
        "layer": 4,
        "token_id": at,
        "token": text,
        "text": text,
        "class": "content",
        "status": status,
        "n_a": 30,
        "n_b": 1200,
        **(both if status == "both" else {}),
        **columns,
    }


def night(rules: list[Rule], movers: list[dict[str, Any]], state: str = "broken") -> Audit:
    run = RunFolder("s/runs/r", "s", "r", {"config": {"corpus": ["/texts/2026-11-02/"]}})
    for row in movers:
        row.setdefault("layer", 4)
    comparison = Comparison(
        run,
        run,
        DRIFT_SCHEMA.empty_table(),
        CLASS_DRIFT_SCHEMA.empty_table(),
        pa.Table.from_pylist(movers, MOVERS_SCHEMA),
        (),
    )
    lost = Losses(0, 0, 0, 0, 0, 0, (), 0, ())
    return Audit(state, tuple(rules), run, Baseline(run), comparison, lost, (), "new", 4)


PSI = Rule(Limit("psi", 0.1), 0.32, "broken", None)
MOVED = [mover("will", "both", 1), mover("unto", "both", 2), mover("noise", "both", 3, q=0.5)]


def test_a_message_says_what_broke_by_how_much_and_what_moved() -> None:
    rules = [
        PSI,
        Rule(Limit("ks", 0.5), 0.01, "held", None),
        Rule(Limit("max_new_types", 500), 979, "broken", None),
        Rule(Limit("min_tokens_ratio", 0.9, of="source"), 0.25, "broken", "/texts/old.jsonl"),
    ]
    new = [mover("jesus", "new", 4), mover("christ", "new", 5), mover("thou", "vanished", 6)]
    found = message(night(rules, [*MOVED, *new]), PAGE)
    assert found.title == "afn audit broken: s: /texts/＜date＞/ 2026-11-02"
    assert (
        found.body.replace("\u2060", "")
        == f"""\
the policy is broken: 3 limits of 4

- psi 0.32, at most 0.1 (3.2 times)
- max_new_types 979, at most 500 (2.0 times)
- source.min_tokens_ratio 0.25, at least 0.9: /texts/old.jsonl

- will: HIGH 9% before, 35% now
- unto: HIGH 9% before, 35% now
- jesus: new, 1,200 times

{PAGE}"""
    )


def test_a_message_says_what_is_usual_for_limits_that_are_numbers_too() -> None:
    """The picture has the nights that the page draws: eight or more."""
    ratio = Rule(Limit("min_tokens_ratio", 0.9), 0.25, "broken", None)
    usual = {"psi": UsualRange(0.004, 0.011, 21), "min_tokens_ratio": UsualRange(0.97, 1.02, 8)}
    lines = message(night([PSI, ratio], []), None, usual).body.splitlines()
    assert lines[2:] == [
        "- psi 0.32, at most 0.1 (3.2 times), usual 0.004-0.011 over 21 nights",
        "- min_tokens_ratio 0.25, at least 0.9, usual 0.97-1.02 over 8 nights",
    ]


def test_what_was_not_judged_comes_first_with_its_reason() -> None:
    rules = [Rule(Limit(key, 1), None, "not judged", None, "no baseline") for key in ("ks", "js")]
    found = message(replace(night([PSI, *rules], MOVED), comparison=None), None)
    lines = found.body.splitlines()
    assert lines[0] == "2 of 3 limits could not be judged; the policy is broken: 1 limit of 3"
    assert lines[2] == "- not judged: ks, js: no baseline" and lines[3].startswith("- psi 0.32")
    assert len(lines) == 4


def test_a_message_fits_a_phone_whatever_is_in_it() -> None:
    rules = [Rule(Limit("psi", 0.1), 0.3, "broken", EVIL * 9)] * 30
    rules += [Rule(Limit("ks", 1), None, "not judged", None, f"{at}{EVIL * 9}") for at in range(30)]
    found = message(
        night(rules, [mover(EVIL * 9, "both", at) for at in range(9)]), "p" * MOST_PAGE_CHARS
    )
    assert len(found.title) < 120 and len(found.body) < 1200
    assert "- and 26 more\n" in found.body and "- and 28 more reasons\n" in found.body
    assert found.body.count("HIGH") == 3


def test_words_of_a_corpus_are_inert_in_markdown_and_in_chats() -> None:
    """Rendered with links, tables and strikethrough, they are text; and nobody is mentioned."""
    rules = [Rule(Limit("psi", 0.1), 0.3, "broken", EVIL)]
    body = message(night(rules, [mover(EVIL, "both", 1)]), PAGE).body
    markdown = MarkdownIt("js-default", {"html": True, "linkify": False})
    tags = set(re.findall(r"</?(\w+)", markdown.render(body)))
    assert tags == {"p", "ul", "li"}
    assert not re.search(r"[<>@|`*\[\]&#~]|\w://(?!pages)|www\.\w|\u202e", body)
    assert (
        inert("caf\u00e9 na\u00efve don't 0.5", 40).replace("\u2060", "") == "café naïve don't 0.5"
    )


def test_the_reason_of_an_acceptance_is_inert_and_cut() -> None:
    accepted = Acceptance(EVIL * 9, "2026-11-02T03:00:00+00:00", None)
    found = replace(
        night([PSI], []), standing=Standing("2026-11-02T02:00:00+00:00", acceptance=accepted)
    )
    first = message(found, None).body.splitlines()[0]
    assert first.startswith("the policy is broken: 1 limit of 1; accepted ") and "channel" in first
    assert not re.search(r"[<>@|`*\[\]&#~]|\w://|www\.\w|\u202e", first)
    assert len(first.replace("\u2060", "")) == MOST_ANSWER_CHARS


# --- services

SECRETS = {
    "slack://T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ/#general": "Slack",
    "workflows://prod.example:443/643a9c2fe1/8f7d6e5c4b": (
        "Power Automate / Workflows (for MSTeams) at prod.example"
    ),
    "pagerduty://A1BRTD4JD@TIiajkdnlazkcOXrIdevi7FQ": "Pager Duty",
    "mailtos://sender:hunter2@mail.example": "E-Mail at mail.example",
    "jsons://token:hunter2@hooks.example/643a9c2fe1": "JSON at hooks.example",
    "discord://4174216298/JHMHI8qBe7bk2ZwO5U711o3dV_js": "Discord",
}


@pytest.mark.parametrize(("url", "name"), SECRETS.items())
def test_a_service_is_named_without_its_secrets(url: str, name: str) -> None:
    (service,) = services.services([url], False)
    assert services.name_of(service) == name


def test_urls_that_are_no_service_or_not_encrypted_are_refused_without_showing_them() -> None:
    for url in ("hunter2", "slack://hunter2", "sslack://a/hunter2", "", "mailto://:hunter2@"):
        with pytest.raises(ConfigError, match=r"number 2 of the --notify URLs") as caught:
            services.services(["jsons://h/x", url], False)
        assert "hunter2" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"JSON at far\.example is not encrypted") as caught:
        services.services(["json://u:hunter2@far.example/hunter2"], False)
    assert "hunter2" not in str(caught.value)
    assert len(services.services(["json://far.example/x"], True)) == 1
    local = ["json://127.0.0.1/x", "json://localhost/", "rsyslog://localhost", "syslog://"]
    assert len(services.services(local, False)) == 4


@pytest.mark.parametrize(
    "url",
    ["rsyslog://far.example", "mailtos://u:hunter2@far.example?mode=insecure"],
)
def test_clear_text_by_a_plain_scheme_alone_or_by_a_mode_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"at far\.example is not encrypted") as caught:
        services.services([url], False)
    assert "hunter2" not in str(caught.value)
    assert len(services.services([url], True)) == 1


def test_a_service_that_does_not_take_it_is_named_with_the_status(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with listening() as hook, caplog.at_level(logging.INFO):
        address = hook.url.removeprefix("http://").removesuffix("secret")
        (service,) = services.services([f"json://{address}hunter2?retry=0"], False)
        hook.statuses = [403]
        why = services.send(service, Message("t", "b"), is_broken=True)
        assert why == "JSON at 127.0.0.1 did not take the verdict: status 403"
        assert services.send(service, Message("t", "b"), is_broken=True) is None
    assert [json.loads(body)["type"] for body in hook.got] == ["failure", "failure"]
    assert "hunter2" not in caplog.text + "".join(capfd.readouterr())


def test_a_page_is_an_http_url_that_markdown_leaves_alone() -> None:
    assert notify.check_page(PAGE, 200) == PAGE
    for url in (
        "s3://b/x",
        "https://h/a b",
        "https://h/)",
        "https://h/" + "x" * 200,
        "https://h/é",
    ):
        with pytest.raises(ConfigError, match="--page-url is"):
            notify.check_page(url, 200)


def test_a_night_is_told_of_unless_it_holds_and_no_url_is_kept(
    tmp_path: Path,
    tiny_bert: Path,
    verses: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    nights = Nights(tmp_path / "nights", tiny_bert, verses, "psi = 0.0\nempty_documents = 0\n")
    with listening() as hook:
        urls = [f"json://{hook.url.removeprefix('http://')}/hunter{at}" for at in range(2)]
        monkeypatch.setenv("AFN_NOTIFY", " ".join(urls) + "\n")
        assert nights.audit("--page-url", PAGE) == 3
        assert nights.begin() == 0
        nights.verses = [*verses[:5], ""]
        nights.add(1, 0, 6)
        monkeypatch.setattr(learned, "LEAST_NIGHTS", 1)
        assert nights.audit() == 1
    first, second, third, _ = map(json.loads, hook.got)
    assert "empty_documents 0.027778, at most 0, usual 0-0 over 1 nights" in third["message"]
    assert first == second and first["type"] == "warning"
    assert first["title"].startswith("afn audit not judged: store: ")
    assert "not judged: psi: the series" in first["message"] and first["message"].endswith(
        f"\n\n{PAGE}"
    )
    shown = "".join(capfd.readouterr())
    written = b"".join(path.read_bytes() for path in nights.folder.rglob("*") if path.is_file())
    assert "hunter" not in shown and b"hunter" not in written and b"secret" not in written
    strictly("audit").validate(nights.said)
    assert nights.audit("--notify", "slack://hunter2") == 2
    assert "hunter2" not in "".join(capfd.readouterr())
