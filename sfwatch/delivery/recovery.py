"""Uploads whose outcome is unknown, and claims that were found again: what became of them, and what follows.

Nothing of them is sent before the service's listing was read for their tag. One look-up serves all files of a
target; what it proves of each is decided in `service.listing`. The journal keeps the order of attempts and
acceptances; no clock of the service, and not the wall clock, decides anything.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from sfwatch import check, files, filing, key
from sfwatch.filing import save, storage
from sfwatch.job import InboxGone, Job, NeedsLookUp, NotTaken, Outcome, Resend, Tools, Undecided
from sfwatch.journal import Delivery, IdKnownError, State, address
from sfwatch.send import answered, list_files, save_accepted, save_orphan, send
from sfwatch.service import listing
from sfwatch.settings import Check, Inbox, OnUnknown, RemoteName, Uploads
from sfwatch.taken import changed, opened, read_and_check, room, take
from sfwatch.verdict import NO_LISTING_STATUSES, Blame, Verdict, tag_of

PROOF_S = 60.0
"""How long an absence is believed: a resend has to begin within this time after its look-up began."""

FEW_PAGES = 10
"""Beyond these the order of a listing may prove an absence: a clock that was set back disturbs few pages."""

PAGE_RETRIES = 3
"""A further page that can't be had now is asked for again so often. The first one's failure is the target's."""


@dataclass(frozen=True, slots=True)
class NoListing:
    """The service has no listing of files."""


Reading = listing.Reading | NoListing


@dataclass(frozen=True, slots=True)
class LookedUp:
    """What one look-up of a target says of each file. `fault`: the listing could not be read to its end."""

    readings: Mapping[str, Reading]  # by tag
    fault: Verdict | None = None


# ── looking up ─────────────────────────────────────────────────────────────────────────────────────────────


def look_up(inbox: Inbox, tools: Tools, wanted: Mapping[str, Delivery], interval_s: float) -> LookedUp:
    """Read the listing page by page until it says of all *wanted* (by tag) what became of them.

    `interval_s`: the pause between two requests that a rate limit asks for.
    """
    try:
        secret = key.read(inbox.api, tools.environ)
    except key.NoKey as missing:
        return LookedUp({}, Verdict(Blame.ACCOUNT, "no_key", str(missing)))
    where = address(tools.target)
    purpose = next((known.purpose for known in wanted.values() if known.purpose), inbox.purpose)
    elsewhere = {tag for tag, known in wanted.items() if known.target and address(known.target) != where}
    readings: dict[str, Reading] = dict.fromkeys(elsewhere, listing.Inconclusive("other_target"))
    wanted = {tag: known for tag, known in wanted.items() if tag not in elsewhere}
    if not wanted:
        return LookedUp(readings)
    with storage(tools.state_dir):
        lost = {tag: _lost(tools, tag, known) for tag, known in wanted.items()}
        names_kept, knows_any = tools.journal.names_kept(where), tools.journal.knows_any(where)
    cursor, seen, fault = listing.Cursor(), listing.Seen(tools.target, lost), None
    end: listing.End | None = None
    asked_again, began = 0, tools.clock()
    while end is None:
        attempt, verdict = list_files(tools, secret, purpose=purpose, limit=cursor.limit, after=cursor.after)
        first = cursor == listing.Cursor()
        if first and verdict.blame is Blame.ACCEPTED and verdict.http_status in NO_LISTING_STATUSES:
            return LookedUp(readings | dict.fromkeys(wanted, NoListing()))
        page = listing.read_page(attempt.answer.body) if attempt.answer and verdict.data is not None else None
        if page is None and not first and verdict.blame is Blame.NOT_NOW and asked_again < PAGE_RETRIES:
            asked_again += 1
            _pause(tools, max(interval_s, verdict.retry_after_s or 0.0, tools.uploads.first_retry_s))
            continue
        if page is None:  # a refused page proves nothing; what was found before counts
            end, fault = listing.End.OPEN, verdict if verdict.blame is not Blame.ACCEPTED else None
            break
        fresh, following, restarted = listing.next_page(cursor, page)
        with storage(tools.state_dir):
            known = tools.journal.known(where, [entry.id for entry in fresh if entry.id])
        # One that this listing shows is of this account, wherever the key came from then.
        known = {id_: replace(upload, target=tools.target) for id_, upload in known.items()}
        listing.see(seen, fresh, known, restarted=restarted)
        if isinstance(following, listing.End):
            end = following
        elif (
            tools.stop()
            or _is_decided(lost, seen, pages=cursor.pages)
            or (interval_s and tools.clock() - began > PROOF_S)
        ):
            end = listing.End.OPEN
        else:
            cursor = following
            _pause(tools, interval_s)
    if fault is not None and first:
        return LookedUp(readings, fault)
    readings |= {
        tag: listing.read(it, seen, end, names_kept=names_kept, knows_any=knows_any) for tag, it in lost.items()
    }
    return LookedUp(readings, fault)


def _pause(tools: Tools, pause_s: float) -> None:
    if pause_s:
        tools.sleep(min(pause_s, tools.uploads.longest_retry_s))


def _is_decided(lost: Mapping[str, listing.Lost], seen: listing.Seen, *, pages: int) -> bool:
    """Whether further pages can't say more. A listing of few pages is read to its end all the same."""
    found_or_absent = (listing.Found, listing.Absent) if pages > FEW_PAGES else (listing.Found,)
    readings = (
        listing.read(it, seen, listing.End.OPEN, names_kept=True, knows_any=True) for it in lost.values()
    )
    return all(isinstance(reading, found_or_absent) for reading in readings)


def _lost(tools: Tools, tag: str, known: Delivery) -> listing.Lost:
    first, last = known.first_sent or 0, known.last_sent or 0
    # Of a claim that has no row: as this daemon names uploads.
    tagged = tag in known.remote_name if known.remote_name else tools.uploads.remote_name is RemoteName.TAGGED
    return listing.Lost(
        tag=tag,
        size=known.size,
        first_sent=first,
        last_sent=last,
        newest_before=tools.journal.accepted_before(tools.target, first),
        tagged=tagged,
    )


def probe(inbox: Inbox, tools: Tools) -> Verdict:
    """Ask a held target for a listing, with the key read again: it costs nothing."""
    try:
        secret = key.read(inbox.api, tools.environ)
    except key.NoKey as missing:
        return Verdict(Blame.ACCOUNT, "no_key", str(missing))
    return list_files(tools, secret, purpose=inbox.purpose, limit=1)[1]


# ── what follows from a look-up (pure) ─────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing is proved yet: look it up again. `held`: no longer in the usual time, so that is reported."""

    detail: str
    held: str | None = None
    candidates: tuple[str, ...] = ()


WHY_UNDECIDED = {
    "no_listing": "the service gives no listing that could tell what became of it",
    "nothing_listed": "no upload is known that the listing could show, so its absence proves nothing",
    "partial_listing": "the listing could not be read to its end, so its absence proves nothing",
    "nothing_known_shown": "the listing lacks the last upload accepted before this one: it may be out of date",
    "names_rewritten": "the service changes the names of files, so its absence proves nothing",
    "unreadable_entry": "an entry of the listing could be it, but its name, size or id does not prove it",
    "size_differs": "the service lists it with another size",
    "slow_listing": "reading the listing takes longer than an absence may be believed",
    "other_target": "it was sent to {target}; the files of its inbox go to another address now",
    "no_tag": "it was sent by version 0.1.0, whose uploads carry no tag; `sfwatch retry` sends it again",
}
"""The reasons of `upload.undecided`, and the sentence with each."""


def next_step(
    reading: Reading, known: Delivery, uploads: Uploads, *, ripe: bool, until: float
) -> listing.Found | Resend | Wait:
    """What a reading allows. `ripe`: the time is over after which an absence counts (`listing.earliest_s`)."""
    match reading:
        case listing.Found():
            return reading
        case listing.Absent() if ripe:
            return Resend("the service does not list it", proved=True, until=until)
        case listing.SizeDiffers():
            return Wait(WHY_UNDECIDED["size_differs"], "size_differs", reading.ids)
        case listing.Unproven() | NoListing():
            reason = "no_listing" if isinstance(reading, NoListing) else "nothing_listed"
            if not ripe:
                return Wait(WHY_UNDECIDED[reason])
            if uploads.on_unknown is OnUnknown.RESEND and known.resends < uploads.resend_limit:
                return Resend(WHY_UNDECIDED[reason], until=until)
            return Wait(WHY_UNDECIDED[reason], reason)
        case listing.Inconclusive(reason="other_target"):
            return Wait(WHY_UNDECIDED["other_target"].format(target=known.target), "other_target")
        case listing.Inconclusive():
            return Wait(WHY_UNDECIDED[reading.reason], reading.reason if ripe else None)
    return Wait("the service does not list it yet")


# ── what a worker does with it ─────────────────────────────────────────────────────────────────────────────


def resume(job: Job, tools: Tools, known: Delivery | None) -> Outcome:
    """Find out what is known of a claim that was found again, or of a row without its claim."""
    if not filing.is_claimed(job):
        if known is None:
            raise FileNotFoundError(job.name)
        if filing.is_away(job):
            return InboxGone(known)
        if filing.lies_in_inbox(job, known):  # a power cut undid the claim
            with suppress(FileNotFoundError):
                fd = take(job)
                if fd is not None:
                    files.close(fd)
    if known is not None and known.state is State.SENDING:
        known = save(tools, replace(known, state=State.UNKNOWN))
    if known is not None and known.state is State.UNKNOWN:
        if known.tag is None:
            return Undecided(known, "no_tag", WHY_UNDECIDED["no_tag"])
        return NeedsLookUp(known)
    if (
        known is not None
        and known.tag is not None
        and job.is_past_known
        and filing.is_what_was_sent(job, known)
    ):
        return NeedsLookUp(known)
    return _identify(job, tools, known)


def _identify(job: Job, tools: Tools, known: Delivery | None) -> Outcome:
    """Compute the tag of a claim that has no row with one; it may be a finished file's, or be unheard of."""
    with opened(job, tools, known) as held:
        if held is None:
            return NotTaken("being_written", "a process has the claimed file open for writing", claimed=True)
        try:
            checked = read_and_check(job, tools, held, Check.NONE)
        except (check.ShortRead, check.Stopped):
            return NotTaken("being_written", "the claimed file changed while it was read", claimed=True)
        found = replace(held.known, sha256=checked.sha256, lines=checked.lines)
    tag = found.tag or tag_of(job.claims, job.name, found.mtime_ns, checked.sha256)  # a row's tag holds
    found = replace(found, tag=tag)
    with storage(tools.state_dir):
        ended = tools.journal.finished(found.tag or "")
    if ended is not None and (ended.answer or ended.report) and _is_same_file(ended, found):
        # A power cut undid its move: only that is done again.
        if known is not None:  # the row of a later file of its name, which starts again
            with storage(tools.state_dir):
                tools.journal.forget(known)
        state = State.ACCEPTED if ended.state is State.DONE else State.REFUSED
        reopened = save(tools, replace(ended, state=state, finished_at=None))
        return filing.file_away(job, tools, reopened, repeated=True)
    if not job.is_past_known:
        with storage(tools.state_dir):
            number = tools.journal.number()
        found = replace(found, state=State.UNKNOWN, attempts=max(1, found.attempts), unproved=1)
        if "-" not in job.claims:  # a folder of version 0.1.0, whose uploads carry no tag
            found = save(tools, replace(found, tag=None, first_sent=0, last_sent=number))
            return Undecided(found, "no_tag", WHY_UNDECIDED["no_tag"])
        # It may have been sent before all that this journal knows, and at any time up to now.
        found = save(tools, replace(found, first_sent=0, last_sent=number))
    return NeedsLookUp(found)


def _is_same_file(one: Delivery, other: Delivery) -> bool:
    return (one.size, one.ino, one.mtime_ns) == (other.size, other.ino, other.mtime_ns)


def take_over(job: Job, tools: Tools, known: Delivery, found: listing.Found) -> Outcome:
    """The listing shows the upload: its id is adopted, unless the file is another one by now."""
    orphans, file_id = list(found.orphans), found.entry.id or ""
    if not filing.is_what_was_sent(job, known):
        return _changed(job, tools, known, [file_id, *orphans])
    verdict = Verdict(Blame.ACCEPTED, "recovered", "", data=found.entry.raw)
    answer = answered(job, tools, verdict, duration_s=None, recovered=True)
    accepted = replace(known, state=State.ACCEPTED, answer=answer, file_id=file_id)
    accepted = replace(accepted, remote_name=known.remote_name or found.entry.name, target=tools.target)
    _remember_orphans(tools, known, orphans)
    try:
        accepted = save_accepted(tools, accepted)
    except IdKnownError:
        return NeedsLookUp(known)  # its id was given to another file meanwhile
    except filing.StorageError as error:
        return error.outcome(claimed=True, known=accepted)
    tools.log(
        "upload.recovered",
        size=known.size,
        attempt=known.attempts,
        file_id=file_id,
        orphans=orphans or None,
    )
    return filing.file_away(job, tools, accepted)


def _remember_orphans(tools: Tools, known: Delivery, orphans: list[str]) -> None:
    """No other file may take these ids for its own."""
    finished = replace(known, row=None, state=State.ORPHAN, finished_at=tools.wall())
    for orphan in orphans:
        with suppress(IdKnownError):
            save(tools, replace(finished, file_id=orphan))


def _changed(job: Job, tools: Tools, known: Delivery, orphans: list[str]) -> Outcome:
    """The claimed file is another one than that which was sent: what the service has of that is an orphan."""
    save_orphan(tools, known, orphans[0] if orphans else None)
    _remember_orphans(tools, known, orphans[1:])
    detail = "the file changed after it was sent; any copy that the service stored is an orphan"
    return changed(job, tools, detail, orphans=orphans or None)


def resend(job: Job, tools: Tools, known: Delivery, why: Resend) -> Outcome:
    try:
        secret = key.read(job.inbox.api, tools.environ)
    except key.NoKey:
        return NeedsLookUp(known)  # that will say so
    room(job, tools)
    with opened(job, tools, known) as held:
        if not filing.is_what_was_sent(job, known):
            return _changed(job, tools, known, [])
        if held is None:  # a process has it open for writing
            return NeedsLookUp(known)
        if known.sha256 is None or not known.first_sent:  # this daemon never sent it, nor checked it
            try:
                checked = read_and_check(job, tools, held, job.inbox.check)
            except (check.ShortRead, check.Stopped):
                return NeedsLookUp(known)
            known = replace(known, sha256=checked.sha256, lines=checked.lines)
            if checked.findings:
                return filing.refuse(job, tools, known, filing.findings_report(checked))
        lost = known

        def still_absent() -> bool:
            """Look again: it may have waited for its slot for longer than a proof holds."""
            began = tools.clock()
            reading = look_up(job.inbox, tools, {lost.tag or "": lost}, 0.0).readings.get(lost.tag or "")
            absent = listing.Absent if why.proved else listing.Unproven | NoListing
            return isinstance(reading, absent) and tools.clock() - began <= PROOF_S

        known = replace(known, target=tools.target, served_s=known.served_s + job.served_s)
        return send(job, tools, replace(held, known=known), secret, still_absent=still_absent)
