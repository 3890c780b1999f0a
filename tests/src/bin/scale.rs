//! Times the operations that must stay quick in a database of millions of rows. `tests/bench/scale` fills one and runs
//! this.
//!
//!     scale DATABASE_URL N

#![expect(clippy::print_stdout, reason = "prints a table")]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use baton_common::id::RequestId;
use baton_common::select::Select;
use baton_common::state::Desired;
use baton_common::store::control::Request;
use baton_common::store::{Location, Store};
use baton_tests::services::programs;

/// The number of calls whose median counts, after a warm-up call.
const CALLS: usize = 5;

type Failure = Box<dyn std::error::Error>;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let (Some(url), Some(n)) = (arguments.next(), arguments.next()) else { return Err("scale DATABASE_URL N".into()) };
    let n: u64 = n.parse()?;
    println!("{n} ended, {n} parked, {n} queued and 1000 held; milliseconds, median of {CALLS} after one warm-up\n");
    commands(&url)?;
    let store = Store::open(Location::parse(&url)?).await?;
    statements(&store).await?;
    once(&store, n).await
}

/// The wall-clock time of `baton`, from start to exit.
fn commands(url: &str) -> Result<(), Failure> {
    let lists = [
        "",
        "--state created",
        "--state running",
        "--state waiting",
        "--state paused",
        "--state finished",
        "--state excepted",
        "--state killed",
        "--state created,running",
        "--state finished,excepted,killed",
        "--session night",
        "--session rare",
        "--session nix",
        "--label campaign=si",
        "--label batch=77",
        "--label rare=yes",
        "--label campaign=nix",
        "--label campaign=si --label batch=77",
        "--queue default",
        "--queue gpu",
        "--queue nix",
        "--kind program",
        "--kind nix",
        "--worker w3",
        "--worker nix",
        "--older-than 1d",
        "--older-than 20d",
        "--older-than 40d",
        "--state waiting --label campaign=si",
        "--state finished --session night",
        "--state killed --kind program",
        "--older-than 20d --session night",
        "-o json",
        "-o ids",
    ];
    for list in lists {
        let text = format!("list -n 50 {list}");
        time_command(url, &text)?;
    }
    let some = baton(url, &["list", "-n", "50", "--state", "created", "-o", "ids"])?;
    let some: Vec<&str> = some.lines().collect();
    let explicit: Vec<&str> = ["list"].into_iter().chain(some.iter().copied()).collect();
    time("list of 50 pids", || baton(url, &explicit).map(drop))?;
    time("list -n 50 --after PID", || baton(url, &["list", "--after", some[49]]).map(drop))?;
    time("explain PID (the last in its queue)", || baton(url, &["explain", some[0]]).map(drop))?;
    time("status PID", || baton(url, &["status", some[0]]).map(drop))?;
    time("show PID", || baton(url, &["show", some[0]]).map(drop))?;
    time_command(url, "workers")?;
    time_command(url, "kill --session night --dry-run")?;
    time_command(url, "prune --older-than 1d --dry-run")
}

/// Sweeps and counts, in this program.
async fn statements(store: &Store) -> Result<(), Failure> {
    println!();
    macro_rules! time_call {
        ($name:literal, $call:expr) => {
            let mut times = Vec::new();
            for _ in 0..=CALLS {
                let started = Instant::now();
                $call.await?;
                times.push(started.elapsed());
            }
            print($name, median(times.split_off(1)));
        };
    }
    let now = store.now().await?;
    let me = store.peers().await?.remove(0).id;
    time_call!("count_by_state", store.count_by_state());
    time_call!("backlogs", store.backlogs());
    time_call!("free (nothing to do)", store.free());
    time_call!("wake_due (nothing to do)", store.wake_due());
    time_call!("next_wake_us", store.next_wake_us());
    time_call!("announce_lost (nothing to do)", store.announce_lost("default", 0));
    time_call!("announce_lost (a page of 1000)", store.announce_lost("default", now));
    time_call!("queued_in (200)", store.queued_in("default", 200));
    time_call!("end_overdue (nothing to do)", store.end_overdue());
    time_call!("forget_gone", store.forget_gone());
    time_call!("desired_of", store.desired_of(me, true));
    time_call!("workers", store.workers(&[], false));
    Ok(())
}

/// Operations that can be done only once.
async fn once(store: &Store, n: u64) -> Result<(), Failure> {
    println!();
    let select = Select { session: Some("night".into()), ..Select::default() };
    let started = Instant::now();
    let (mut count, mut longest) = (0, Duration::ZERO);
    let pause = Request::new(Desired::Pause, "bench");
    let mut many = store.control_many(RequestId::generate(), &select, &pause).await?.ok_or("it is new")?;
    loop {
        let page = Instant::now();
        let Some(rows) = many.next().await? else { break };
        longest = longest.max(page.elapsed());
        count += rows.len();
        if count >= 100_000 {
            break;
        }
    }
    print(&format!("pause of {count} of a session"), started.elapsed());
    print("  its longest page", longest);

    let started = Instant::now();
    let wanted = (n / 10).max(1);
    let (mut pruned, mut longest) = (0, Duration::ZERO);
    let mut pruning = store.prune(&Select::default(), Duration::from_secs(86_400)).await?;
    while pruned < wanted {
        let page = Instant::now();
        let Some(removed) = pruning.next().await? else { break };
        longest = longest.max(page.elapsed());
        pruned += removed;
    }
    print(&format!("prune of {pruned}"), started.elapsed());
    print("  its longest page", longest);
    Ok(())
}

fn time_command(url: &str, text: &str) -> Result<(), Failure> {
    let words: Vec<&str> = text.split_whitespace().collect();
    time(text, || baton(url, &words).map(drop))
}

fn time(name: &str, mut call: impl FnMut() -> Result<(), Failure>) -> Result<(), Failure> {
    let mut times = Vec::new();
    for _ in 0..=CALLS {
        let started = Instant::now();
        call()?;
        times.push(started.elapsed());
    }
    print(name, median(times.split_off(1)));
    Ok(())
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn print(name: &str, time: Duration) {
    println!("{name:<48}{:>9.1}", time.as_secs_f64() * 1e3);
}

/// Runs the command without a broker, and returns its output.
fn baton(url: &str, words: &[&str]) -> Result<String, Failure> {
    let mut command = Command::new(programs().join("baton"));
    command.args(words).env_clear().env("BATON_DATABASE_URL", url).current_dir(Path::new("/")).stdin(Stdio::null());
    let output = command.output()?;
    if !output.status.success() {
        return Err(format!("baton {}: {}", words.join(" "), String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(String::from_utf8(output.stdout)?)
}
