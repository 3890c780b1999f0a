//! The watch over the jobs of a site. One worker of the fleet has the watch and lists all jobs at an interval, over one
//! persistent shell.
//!
//! A launcher's list ends no process. It wakes the process, which reads the files of its script. A job that is missing in
//! a list has ended only if its script says so, or if it is missing repeatedly and the launcher, asked for this job
//! alone, confirms that it is gone. A list that fails or is malformed says nothing about any job. The watch also ends
//! jobs that are no longer wanted, and jobs that appear after they were taken for gone.

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use baton_common::border;
use baton_common::config;
use baton_common::store::site::{Job, Look, Seen};
use tracing::{debug, info, warn};

use super::launcher::{ENDED, LOST, Launcher, Listed, Phase};
use super::pool::Channel;
use super::{COMMAND_LIMIT, Site, Visit, script};
use crate::transport::{self, Output, Shell, quote};

/// Lists in a row that must miss a job, in addition to the site's `settle`, before it counts as gone.
const ABSENT_MIN: i64 = 3;

/// Jobs that are ended in one look.
const REAPED_MAX: usize = 50;

/// Jobs whose end is confirmed in one look: each needs a command, which may take as long as all others together.
const CONFIRMED_MAX: usize = 5;

/// How long the watch is kept without jobs.
const KEPT: Duration = Duration::from_secs(10);

/// This worker's part in the watch.
#[derive(Default)]
pub(crate) struct Watch {
    open: Option<Open>,
    next: Option<Instant>,
    last_needed: Option<Instant>,
    has_complained: bool,
}

struct Open {
    root: String,
    shell: Shell,
    // The channel of the shell.
    channel: Channel,
}

impl Open {
    async fn run(&mut self, script: &str) -> Result<Output, transport::Error> {
        self.shell.run(script, COMMAND_LIMIT).await
    }
}

impl Watch {
    /// Looks at the jobs if that is due and this worker has the watch or can take it.
    pub(crate) async fn look(&mut self, site: &Site, has_jobs: bool) {
        let now = Instant::now();
        if has_jobs {
            self.last_needed = Some(now);
        } else if self.last_needed.is_none_or(|needed| needed.elapsed() > KEPT) {
            self.give_up(site).await;
            return;
        }
        if !has_jobs || self.next.is_some_and(|next| now < next) {
            return;
        }
        match site.store.take_permit(&site.watch(), site.me).await {
            Ok(true) => {}
            Ok(false) => {
                self.open = None;
                return;
            }
            Err(error) => {
                debug!(site = site.name, %error, "giving the watch up while the database does not answer");
                return;
            }
        }
        if self.open.is_none() && !self.enter(site).await {
            // Another worker may have a session.
            let _ = site.store.give_permit(&site.watch(), site.me).await;
            return;
        }
        if self.open.as_ref().is_some_and(|open| site.pool.is_fading(&open.channel)) {
            // The session is about to be closed; the next look uses a younger one.
            self.open = None;
            return;
        }
        let interval = i64::try_from(site.config.poll.as_micros()).unwrap_or(i64::MAX);
        match site.store.begin_poll(&site.name, interval).await {
            Ok(true) => {}
            Ok(false) | Err(_) => return,
        }
        self.next = Some(now + site.config.poll.mul_f64(0.9));
        let Some(open) = &mut self.open else { return };
        match poll(site, open).await {
            Ok(()) => {
                self.has_complained = false;
                let _ = site.store.note_launcher(&site.name, None).await;
                if site.config.transport == config::Transport::Local {
                    // For other transports, opening a session clears an earlier failure.
                    let _ = site.store.note_site(&site.name, None).await;
                }
            }
            Err(Failure::Transport(error)) => {
                self.open = None;
                site.failed(&error).await;
            }
            Err(Failure::Launcher(text)) => {
                if !self.has_complained {
                    warn!(
                        site = site.name,
                        error = text,
                        "the launcher does not answer; its jobs are left as they are"
                    );
                    self.has_complained = true;
                }
                let _ = site.store.note_launcher(&site.name, Some(&text)).await;
            }
            Err(Failure::Store(error)) => debug!(site = site.name, %error, "the look could not be recorded"),
        }
    }

    /// Gives the watch up.
    pub(crate) async fn give_up(&mut self, site: &Site) {
        if self.open.take().is_some() {
            let _ = site.store.give_permit(&site.watch(), site.me).await;
        }
    }

    async fn enter(&mut self, site: &Site) -> bool {
        let Ok(Visit { session, root }) = site.open().await else { return false };
        match session.shell().await {
            Ok(shell) => {
                info!(site = site.name, "this worker has the watch over the jobs");
                self.open = Some(Open { root, shell, channel: session });
                true
            }
            Err(error) => {
                site.failed(&error).await;
                false
            }
        }
    }
}

enum Failure {
    Transport(transport::Error),
    Launcher(String),
    Store(baton_common::store::Error),
}

impl From<transport::Error> for Failure {
    fn from(error: transport::Error) -> Self {
        Failure::Transport(error)
    }
}

impl From<baton_common::store::Error> for Failure {
    fn from(error: baton_common::store::Error) -> Self {
        Failure::Store(error)
    }
}

async fn poll(site: &Site, open: &mut Open) -> Result<(), Failure> {
    let jobs = site.store.open_jobs(&site.name).await?;
    let dirs: Vec<(&Job, String)> =
        jobs.iter().map(|job| (job, format!("{}/p/{}/{}", open.root, job.pid, job.try_number))).collect();
    let output = open.run(&site.launcher.list(&dirs, None)).await?;
    let listed = site.launcher.listed(&output).map_err(Failure::Launcher)?;
    let found = Found::of(&listed);
    let positions = positions(site, open, dirs.iter().filter_map(|(job, _)| found.job(job))).await?;
    let missing = dirs.iter().filter(|(job, _)| job.external_id.is_some() && found.job(job).is_none());
    let odd =
        dirs.iter().filter(|(job, _)| found.job(job).is_some_and(|found| may_have_run(site.launcher, job, found)));
    let done = done(open, missing.chain(odd)).await?;
    let settling = site.config.settle.as_millis() / site.config.poll.as_millis().max(1);
    let absent_max = i64::try_from(settling).unwrap_or(i64::MAX).max(ABSENT_MIN);
    let is_long_absent =
        |job: &Job| found.job(job).is_none() && !done.contains(&job.token()) && job.look.absent + 1 >= absent_max;
    let absent: Vec<&Job> = dirs.iter().map(|(job, _)| *job).filter(|job| is_long_absent(job)).collect();
    let gone = gone(site, open, &absent).await?;
    let mut seen = Vec::new();
    let mut unwanted = Vec::new();
    for (job, dir) in &dirs {
        let listed = found.job(job);
        let is_done = done.contains(&job.token());
        let before = unchanged(job);
        let now = seen_now(job, listed, is_done, &positions, &gone);
        // Ended are unwanted jobs, and those that wait again although their program has ended.
        if (job.is_doomed && !now.is_ended) || (is_done && listed.is_some()) {
            unwanted.push((*job, dir, listed));
        }
        if now != before {
            seen.push(now);
        }
    }
    for page in seen.chunks(1000) {
        let woken = site.store.record_seen(page).await?;
        if page.iter().any(|seen| seen.is_ended) {
            border!("job-seen");
        }
        site.outbox.announce_all(woken).await;
    }
    for (job, dir, found) in unwanted.into_iter().take(REAPED_MAX) {
        reap(site, open, job, dir, found).await?;
    }
    end_strays(site, open, &jobs, &found).await
}

/// A job as its row has it.
fn unchanged(job: &Job) -> Seen {
    Seen { pid: job.pid, try_number: job.try_number, external_id: None, look: job.look.clone(), is_ended: false }
}

/// A job as this look shows it: by the list, by its script (`is_done`), or by the launcher's confirmation that it is
/// gone.
fn seen_now(
    job: &Job,
    listed: Option<&Listed>,
    is_done: bool,
    positions: &Positions,
    gone: &HashMap<String, String>,
) -> Seen {
    let before = unchanged(job);
    let ended = |status: &str| {
        let look = Look { status: status.to_owned(), ..job.look.clone() };
        Seen { look, is_ended: true, ..before.clone() }
    };
    match (listed, job.external_id.as_deref()) {
        (_, _) if is_done => ended(ENDED),
        (Some(found), _) => {
            let priority = found.priority.filter(|_| found.phase == Phase::Waiting);
            let look = Look {
                status: found.status.clone(),
                reason: found.reason.clone(),
                position: priority.map(|priority| positions.of(priority)),
                starts_at: found.starts_at,
                absent: 0,
            };
            let external_id = job.external_id.is_none().then(|| found.external_id.clone());
            Seen { external_id, look, is_ended: found.phase == Phase::Ended, ..before }
        }
        (None, None) => before,
        (None, Some(id)) => match gone.get(id) {
            Some(status) => ended(status),
            None => Seen { look: Look { absent: job.look.absent + 1, ..job.look.clone() }, ..before },
        },
    }
}

/// Whether a listed job may have run its program already: it waits, but not for the first time, or its state is unknown.
fn may_have_run(launcher: &dyn Launcher, job: &Job, found: &Listed) -> bool {
    let waited_first = job.look.status.is_empty() || launcher.is_first_wait(&job.look.status);
    match found.phase {
        Phase::Waiting => !(launcher.is_first_wait(&found.status) && waited_first),
        Phase::Unknown => true,
        Phase::Running | Phase::Ended => false,
    }
}

/// The listed jobs by their tokens.
struct Found<'a>(HashMap<&'a str, &'a Listed>);

impl<'a> Found<'a> {
    fn of(listed: &'a [Listed]) -> Self {
        let mut by_token: HashMap<&str, &Listed> = HashMap::new();
        for one in listed {
            let entry = by_token.entry(&one.token).or_insert(one);
            // Of several jobs with one token, one that has not ended counts.
            if entry.phase == Phase::Ended {
                *entry = one;
            }
        }
        Found(by_token)
    }

    fn job(&self, job: &Job) -> Option<&'a Listed> {
        self.0.get(job.token().as_str()).copied()
    }
}

/// Returns those of the missing jobs that the launcher confirms as gone, with their statuses. An empty or incomplete list
/// is not a confirmation.
async fn gone(site: &Site, open: &mut Open, absent: &[&Job]) -> Result<HashMap<String, String>, Failure> {
    let mut ids: Vec<&str> = absent.iter().filter_map(|job| job.external_id.as_deref()).collect();
    let Some(n_looks) = absent.iter().map(|job| job.look.absent).max() else { return Ok(HashMap::new()) };
    // Other jobs in each look, in case the launcher knows nothing about the first.
    let n_asked = usize::try_from(n_looks).unwrap_or(0).saturating_mul(CONFIRMED_MAX);
    let first_idx = n_asked.checked_rem(ids.len()).unwrap_or(0);
    ids.rotate_left(first_idx);
    ids.truncate(CONFIRMED_MAX);
    let Some(script) = site.launcher.confirm(&ids) else {
        return Ok(ids.into_iter().map(|id| (id.to_owned(), LOST.to_owned())).collect());
    };
    let output = open.run(&script).await?;
    let text = String::from_utf8_lossy(&output.stdout);
    let pairs = text.lines().filter_map(|line| line.split_once('|'));
    Ok(pairs.map(|(id, word)| (id.to_owned(), word.to_owned())).collect())
}

/// Ends jobs that appear although their rows have ended: a submission that took effect late, or a job that the launcher
/// had lost. A token without a row belongs to another fleet.
async fn end_strays(site: &Site, open: &mut Open, jobs: &[Job], found: &Found<'_>) -> Result<(), Failure> {
    let known: HashSet<String> = jobs.iter().map(Job::token).collect();
    let strange = found.0.values().filter(|one| one.phase != Phase::Ended && !known.contains(&one.token));
    let strange: HashMap<&str, &str> =
        strange.map(|one| (one.token.as_str(), one.external_id.as_str())).take(REAPED_MAX).collect();
    if strange.is_empty() {
        return Ok(());
    }
    let ended = site.store.ended_jobs(strange.keys().copied()).await?;
    for id in ended.iter().filter_map(|token| strange.get(token.as_str())) {
        info!(site = site.name, job = id, "ending a job that was taken for gone");
        open.run(&site.launcher.cancel(id)).await?;
    }
    Ok(())
}

/// Returns the tokens of those jobs whose scripts have reported the end of their programs.
async fn done<'a>(
    open: &mut Open,
    jobs: impl Iterator<Item = &'a (&'a Job, String)>,
) -> Result<HashSet<String>, Failure> {
    let mut script = String::from("mark() { [ ! -f \"$2/.baton/done.json\" ] || echo \"$1\"; }\n");
    let mut is_any = false;
    for (job, dir) in jobs {
        is_any = true;
        let _ = writeln!(script, "mark {} {}", job.token(), quote(dir));
    }
    if !is_any {
        return Ok(HashSet::new());
    }
    let stdout = open.run(&script).await?.ok()?;
    Ok(String::from_utf8_lossy(&stdout).lines().map(str::to_owned).collect())
}

/// The priorities of all waiting jobs of a site, the largest first.
struct Positions(Vec<i64>);

impl Positions {
    /// The position of a priority, from 1.
    fn of(&self, priority: i64) -> i64 {
        i64::try_from(self.0.partition_point(|other| *other > priority)).unwrap_or(i64::MAX - 1) + 1
    }
}

async fn positions(
    site: &Site,
    open: &mut Open,
    mut ours: impl Iterator<Item = &Listed>,
) -> Result<Positions, Failure> {
    let is_any_waiting = ours.any(|one| one.phase == Phase::Waiting);
    let Some(script) = site.launcher.waiting().filter(|_| is_any_waiting) else { return Ok(Positions(vec![])) };
    let output = open.run(script).await?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut priorities: Vec<i64> = text.lines().filter_map(|line| line.trim().parse().ok()).collect();
    priorities.sort_unstable_by_key(|priority| std::cmp::Reverse(*priority));
    Ok(Positions(priorities))
}

/// Ends a job that is no longer wanted, or makes sure that it never runs.
async fn reap(site: &Site, open: &mut Open, job: &Job, dir: &str, found: Option<&Listed>) -> Result<(), Failure> {
    let id = found.map(|found| found.external_id.clone()).or_else(|| job.external_id.clone());
    // A submission or a job that is still on its way finds both taken and runs nothing.
    let folder = quote(&format!("{dir}/{}", script::FOLDER));
    let mut script = format!("mkdir -p {folder} && mkdir {folder}/submit 2>/dev/null\n{}", script::give_up(dir));
    if let Some(id) = &id {
        info!(pid = %job.pid, site = site.name, job = id, "ending a job that is no longer wanted");
        let _ = writeln!(script, "{}", site.launcher.cancel(id));
    }
    open.run(&script).await?;
    if id.is_none() {
        let settled = site.config.submit_timeout + site.config.settle;
        let age = site.store.now().await? - job.intent_at;
        if age > i64::try_from(settled.as_micros()).unwrap_or(i64::MAX) {
            site.store.record_seen(&[Seen::ended(job, "")]).await?;
        }
    }
    Ok(())
}
