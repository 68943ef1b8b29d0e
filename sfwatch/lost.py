"""An answer was lost: the upload is looked up in the service's listing before anything is sent again.

Found, its id is taken over. Provably absent, it is sent again. While nobody can tell, the file stays claimed.
"""

from contextlib import suppress
from dataclasses import replace

from sfwatch import check, files, filing, key, reconcile
from sfwatch.filing import StorageError, save, storage
from sfwatch.job import (
    InboxGone,
    Job,
    LookAgain,
    Outcome,
    Tools,
    Undecided,
)
from sfwatch.journal import AttemptOpenError, Delivery, IdKnownError, State, address
from sfwatch.send import answered, deferred, no_key, send
from sfwatch.settings import Check, Inbox, OnUnknown, RemoteName
from sfwatch.taken import changed, opened, read_and_check, room, take
from sfwatch.verdict import Attempt, Blame, Verdict, judge_listing, remote_name


def clear_up(job: Job, tools: Tools, known: Delivery) -> Outcome:
    """Look the upload up before anything is sent again."""
    try:
        secret = key.read(job.inbox.api, tools.environ)
    except key.NoKey as missing:
        return no_key(job, tools, missing, known)
    ready = _ready_to_look_up(job, tools, known)
    if not isinstance(ready, Delivery):
        return ready
    known = ready
    if not job.insist and known.target and address(known.target) != address(tools.target):
        detail = f"it was sent to {known.target}, which is not in the configuration any more"
        return Undecided(known, "other_target", detail)
    if not filing.is_what_was_sent(job, tools, known):
        return _settle_anew(job, tools, known, secret)
    if job.insist:
        return _resend(job, tools, known, secret, "it was asked for")
    return _decided(job, tools, known, secret, _look_up(job, tools, known, secret))


def _decided(job: Job, tools: Tools, known: Delivery, secret: "key.Key", reading: "Reading") -> Outcome:
    match reading:
        case Verdict():
            return deferred(reading, known, claimed=True)
        case reconcile.Found():
            return _recover(job, tools, known, reading)
        case reconcile.Undecidable():
            detail = "the service lists more uploads like this one than were tried"
            return Undecided(known, "several_matches", detail, reading.candidates)
        case reconcile.Absent() if job.looked_s < tools.uploads.reconcile_window_s:
            return LookAgain(known, "the service does not list it yet")
        case reconcile.Absent() if _may_resend(tools, known):
            return _resend(job, tools, known, secret, "the service does not list it")
        case reconcile.Absent():
            detail = "the service lists none of the uploads so far, so that this one's absence tells nothing"
            return Undecided(known, "nothing_listed", detail)
        case reconcile.NotYet():
            return _without_listing(job, tools, known, secret, reading.reason)


def _may_resend(tools: Tools, known: Delivery) -> bool:
    """An absence counts where the listing was seen to show what was accepted; else only so many times."""
    with storage(tools.state_dir):
        shows = tools.journal.newest(tools.target) is not None
    return shows or known.resent < tools.uploads.resend_limit


def _ready_to_look_up(job: Job, tools: Tools, known: Delivery) -> Delivery | Outcome:
    """Claim it again if a power cut undid that, and complete what is known of it."""
    if not filing.is_claimed(job, tools):
        if filing.lies_in_inbox(job, known):
            fd = take(job, tools)
            if fd is not None:
                files.close(fd)
        elif filing.is_away(job, tools, known):
            return InboxGone(known)
    known = _with_window(tools, known)
    if known.sha256 is not None:
        return known
    detail = "it cannot be read to its end now, and without its digest nothing can be told"
    return _with_digest(job, tools, known) or LookAgain(known, detail)


def _with_window(tools: Tools, known: Delivery) -> Delivery:
    """Close the window of an attempt that a crash cut off."""
    if known.state is not State.SENDING:
        return known
    windows = (*known.windows[:-1], (known.windows[-1][0], tools.wall()))
    return save(tools, replace(known, state=State.UNKNOWN, windows=windows))


def _with_digest(job: Job, tools: Tools, known: Delivery) -> Delivery | None:
    """Look into a claim that only its folder told of; None if that can't be done now."""
    with opened(job, tools, known) as held, suppress(check.ShortRead, check.Stopped, AttemptOpenError):
        if held is None:
            return None
        checked = read_and_check(job, tools, held, Check.NONE)
        tagged = tools.uploads.remote_name is RemoteName.TAGGED
        remote = remote_name(job.name, tag=checked.sha256[:12] if tagged else None)
        filled = replace(known, sha256=checked.sha256, lines=checked.lines, remote_name=remote)
        return save(tools, replace(filled, target=tools.target))
    return None


def _settle_anew(job: Job, tools: Tools, known: Delivery, secret: "key.Key") -> Outcome:
    """The claimed file is another one than that whose answer was lost: that upload is nobody's."""
    reading = _look_up(job, tools, known, secret)
    orphan = reading.entry.id if isinstance(reading, reconcile.Found) else None
    save(tools, replace(known, state=State.FAILED, file_id=orphan, finished_at=tools.wall()))
    detail = "it was changed after it had been sent; nobody's is what the service may have of it"
    return changed(job, tools, detail, orphans=[orphan] if orphan else None)


Reading = reconcile.Found | reconcile.Absent | reconcile.NotYet | reconcile.Undecidable | Verdict


def _look_up(job: Job, tools: Tools, known: Delivery, secret: "key.Key") -> Reading:
    """Ask for listings of growing length until one decides."""
    reading: Reading = reconcile.NotYet("full")
    smaller: tuple[int, int] | None = None
    with storage(tools.state_dir):
        newest = tools.journal.newest(tools.target)  # before the listing is made, which then must show it
    for limit in (100, 1000, 10000):
        attempt = tools.client.list_files(purpose=job.inbox.purpose, limit=limit, key=secret.reveal())
        verdict = _judge_listing(tools, attempt)
        if verdict.blame is not Blame.ACCEPTED:
            return verdict
        answer = attempt.answer
        listing = reconcile.read_listing(answer.body) if answer and verdict.data is not None else None
        if answer is None or listing is None:
            return reconcile.NotYet("no_listing")
        reading = _match(
            job, tools, known, listing, limit=limit, smaller=smaller, newest=newest, date=answer.date
        )
        if not isinstance(reading, reconcile.NotYet) or reading.reason != "full":
            return reading
        smaller = (limit, len(listing))
    return reading


def probe(inbox: Inbox, tools: Tools) -> Verdict:
    """Ask a held target for a listing, with the key read anew: it costs nothing."""
    try:
        secret = key.read(inbox.api, tools.environ)
    except key.NoKey as missing:
        return Verdict(Blame.ACCOUNT, "no_key", str(missing))
    attempt = tools.client.list_files(purpose=inbox.purpose, limit=1, key=secret.reveal())
    return _judge_listing(tools, attempt)


def _judge_listing(tools: Tools, attempt: Attempt) -> Verdict:
    client = tools.client
    return judge_listing(attempt, host=client.host, reached_before=client.resolved, wall=tools.wall())


def _match(
    job: Job,
    tools: Tools,
    known: Delivery,
    listing: tuple[reconcile.Listed, ...],
    *,
    limit: int,
    smaller: tuple[int, int] | None,
    newest: str | None,
    date: str | None,
) -> Reading:
    lost = reconcile.Lost(known.remote_name or "", known.size, known.lines, known.windows, job.inbox.purpose)
    skew = reconcile.skew_s(date, wall=tools.wall())
    with storage(tools.state_dir):
        known_ids = tools.journal.known(tools.target, [entry.id for entry in listing])
    return reconcile.match(
        lost,
        listing,
        limit=limit,
        smaller=smaller,
        known_ids=known_ids,
        newest_known=newest,
        allowance_s=reconcile.allowance_s(skew),
    )


def _recover(job: Job, tools: Tools, known: Delivery, found: reconcile.Found) -> Outcome:
    verdict = Verdict(Blame.ACCEPTED, "recovered", "", data=found.entry.raw)
    answer = answered(job, tools, verdict, duration_s=None, recovered=True)
    accepted = replace(known, state=State.ACCEPTED, answer=answer, file_id=found.entry.id)
    try:
        accepted = save(tools, accepted)
    except IdKnownError:
        return LookAgain(known, "its id was given to another file meanwhile")
    except StorageError as error:
        return error.outcome(claimed=True, known=accepted)
    _remember_orphans(tools, known, found.orphans)
    tools.log(
        "upload.recovered",
        size=known.size,
        attempt=known.attempts,
        file_id=found.entry.id,
        orphans=list(found.orphans) or None,
    )
    return filing.file_away(job, tools, accepted)


def _remember_orphans(tools: Tools, known: Delivery, orphans: tuple[str, ...]) -> None:
    """No other lost upload may take these ids for its own."""
    nobodys = replace(known, row=None, state=State.FAILED, finished_at=tools.wall())
    for orphan in orphans:
        with suppress(IdKnownError):
            save(tools, replace(nobodys, file_id=orphan))


def _without_listing(job: Job, tools: Tools, known: Delivery, secret: "key.Key", reason: str) -> Outcome:
    """Send it again where no listing is to be had; one that is stale or never whole proves no absence."""
    detail = "the service gives no listing that could tell what became of it"
    if job.looked_s < tools.uploads.reconcile_window_s:
        return LookAgain(known, detail)
    may_resend = reason == "no_listing" and tools.uploads.on_unknown is OnUnknown.RESEND
    if may_resend and known.resent < tools.uploads.resend_limit:
        return _resend(job, tools, known, secret, detail)
    return Undecided(known, reason, detail)


def _resend(job: Job, tools: Tools, known: Delivery, secret: "key.Key", detail: str) -> Outcome:
    room(job, tools)
    with opened(job, tools, known) as held:
        if held is None:
            return Undecided(known, "changed", "it was changed after it had been sent")
        tools.log("upload.resent", size=known.size, attempt=known.attempts + 1, detail=detail)
        return send(job, tools, replace(held, known=known), secret)
