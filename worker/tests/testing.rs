//! The test kit: that it behaves as a worker does, and that it finds what it is for.

use std::cell::Cell;
use std::time::Duration;

use baton_worker::prelude::*;
use baton_worker::testing::{
    End, Harness, How, NotRestored, Step, run_with_crash_after_every_advance, run_with_crash_in_every_advance,
};

/// Counts to `to`; each third advance waits.
#[derive(Serialize, Deserialize)]
struct Count {
    to: u32,
    #[serde(default)]
    done: u32,
}

impl Process for Count {
    fn start(input: &Value) -> Result<Self, Error> {
        let count: Count = read_input(input)?;
        if count.to == 0 { Err(Error::Input("`to` must be at least 1".into())) } else { Ok(count) }
    }

    async fn advance(&mut self, context: &Context) -> Result<Advance, Error> {
        self.done += 1;
        context.log(format!("now at {}", self.done));
        context.set_value("done", self.done);
        context.set_progress(self.done.into(), Some(self.to.into()));
        Ok(match self.done {
            done if done >= self.to => Advance::Finished { exit: 0 },
            done if done.is_multiple_of(3) => Advance::After(Duration::from_secs(3600)),
            _ => Advance::Again,
        })
    }
}

fn count(to: u32) -> Harness {
    Harness::new::<Count>(json!({ "to": to }))
}

#[test]
fn advances_are_made_one_by_one_and_waits_pass_on_the_clock_of_the_harness() {
    let mut count = count(4);
    assert_eq!((count.advance(), count.advance()), (Step::Again, Step::Again));
    assert_eq!(count.advance(), Step::After(Duration::from_secs(3600)));
    assert_eq!((count.elapsed(), count.advances(), count.progress()), (Duration::ZERO, 3, Some((3, Some(4)))));
    let Step::Ended(end) = count.advance() else { panic!("the fourth is the last") };
    assert_eq!((end.how, end.exit, end.ok, &end.values["done"]), (How::Finished, Some(0), true, &json!(4)));
    assert_eq!(count.elapsed(), Duration::from_secs(3600));
    assert_eq!(count.log(), ["now at 1", "now at 2", "now at 3", "now at 4"]);
    assert_eq!(count.end_state(), Some(&end));
}

#[test]
fn counter_that_crashes_after_every_advance_ends_with_the_same_values() {
    let end = run_with_crash_after_every_advance(|| count(7));
    assert_eq!(end.values["done"], 7);
    assert_eq!(run_with_crash_in_every_advance(|| count(7)), end);
}

#[test]
fn crash_repeats_the_advance_under_the_same_number_and_loses_what_was_not_committed() {
    let mut count = count(3);
    count.advance();
    assert!(count.crash_before_commit());
    assert_eq!((count.advances(), count.values()["done"].clone()), (1, json!(1)));
    assert_eq!(count.log(), ["now at 1"]);
    assert_eq!(count.run_to_end().values["done"], 3);
    assert_eq!(count.advances(), 3);
}

#[test]
fn wrong_input_excepts_the_process() {
    let mut none = count(0);
    let Step::Ended(End { how: How::Excepted, reason: Some(reason), .. }) = none.advance() else { panic!("excepted") };
    assert!(reason.contains("`to` must be at least 1"), "{reason}");
    let end = Harness::new::<Count>(json!({"to": "x"})).run_to_end();
    assert!(end.reason.as_ref().unwrap().contains("`with`: invalid type"), "{end:?}");
}

/// Keeps its count outside of its checkpoint, which is the fault that the kit is to find.
#[derive(Serialize, Deserialize)]
struct Forgetful {
    #[serde(skip)]
    done: u32,
}

impl Process for Forgetful {
    fn start(_input: &Value) -> Result<Self, Error> {
        Ok(Forgetful { done: 0 })
    }

    async fn advance(&mut self, context: &Context) -> Result<Advance, Error> {
        self.done += 1;
        context.set_value("done", self.done);
        Ok(if self.done == 3 { Advance::Finished { exit: 0 } } else { Advance::Again })
    }
}

#[test]
#[should_panic(expected = "Is a part of its state not serialized?")]
fn state_that_is_not_serialized_is_found() {
    run_with_crash_after_every_advance(|| Harness::new::<Forgetful>(json!({})));
}

/// Does everything that takes time, and notes what it saw.
#[derive(Default, Serialize, Deserialize)]
struct Slow {
    #[serde(default)]
    cleaned_up: bool,
}

thread_local! {
    static INTERRUPTED: Cell<Option<Interrupt>> = const { Cell::new(None) };
    static ENDED_OUTSIDE: Cell<u32> = const { Cell::new(0) };
}

impl Process for Slow {
    fn start(_input: &Value) -> Result<Self, Error> {
        Ok(Slow::default())
    }

    async fn advance(&mut self, context: &Context) -> Result<Advance, Error> {
        let thread = context.blocking(|| std::thread::current().id()).await?;
        context.set_value("is_elsewhere", thread != std::thread::current().id());
        context.sleep(Duration::from_secs(60)).await;
        let late = context.timeout(Duration::from_secs(10), context.sleep(Duration::from_secs(20))).await;
        context.set_value("is_late", late.is_none());
        let answer = tokio::task::spawn_local(async { 7 }).await.map_err(Error::failed)?;
        context.set_value("answer", answer);
        Ok(if context.advance_number() == 3 { Advance::Finished { exit: 0 } } else { Advance::Linger(Duration::ZERO) })
    }

    async fn interrupted(&mut self, context: &Context, why: Interrupt) {
        INTERRUPTED.set(Some(why));
        self.cleaned_up = true;
        context.sleep(Duration::from_secs(1)).await;
    }

    async fn end_outside(&mut self, _context: &Context) -> Result<(), Error> {
        ENDED_OUTSIDE.set(ENDED_OUTSIDE.get() + 1);
        Ok(())
    }
}

fn slow() -> Harness {
    Harness::new::<Slow>(json!({}))
}

#[test]
fn sleeps_deadlines_blocking_work_and_local_tasks_need_no_real_time() {
    let started = std::time::Instant::now();
    let mut slow = slow();
    let end = slow.run_to_end();
    assert_eq!(Value::Object(end.values), json!({"is_elsewhere": true, "is_late": true, "answer": 7}));
    assert_eq!(slow.elapsed(), 3 * Duration::from_secs(70));
    assert!(started.elapsed() < Duration::from_secs(10));
}

#[test]
fn crash_in_the_middle_of_an_advance_calls_nothing_and_loses_the_advance() {
    let mut slow = slow();
    for n in [1, 2, 3] {
        assert_eq!(slow.crash_at_await(n), None);
        assert_eq!(slow.advances(), 0);
    }
    assert_eq!(INTERRUPTED.get(), None);
    assert_eq!(slow.crash_at_await(100), Some(Step::Linger(Duration::ZERO)), "it suspends less often");
    assert!(slow.run_to_end().ok);
}

#[test]
fn interrupts_call_the_process_and_discard_the_advance() {
    let mut slow = slow();
    assert_eq!(slow.interrupt_at_await(2, Interrupt::Drain), None);
    assert_eq!(INTERRUPTED.get(), Some(Interrupt::Drain));
    slow.advance();
    assert_eq!(slow.interrupt_at_await(1, Interrupt::Pause), None);
    assert_eq!((INTERRUPTED.get(), slow.advances()), (Some(Interrupt::Pause), 1));
    slow.play();
    assert_eq!(slow.interrupt_at_await(1, Interrupt::Kill), None);
    let end = slow.end_state().unwrap();
    assert_eq!((INTERRUPTED.get(), end.how, ENDED_OUTSIDE.get()), (Some(Interrupt::Kill), How::Killed, 1));
    assert_eq!(end.values["answer"], 7, "those of the checkpoint");
}

#[test]
#[should_panic(expected = "the process is paused; `Harness::play` resumes it")]
fn paused_process_does_not_advance() {
    let mut count = count(3);
    count.advance();
    count.pause();
    count.advance();
}

#[test]
fn kill_between_two_advances_ends_what_is_outside_only_while_the_process_is_held() {
    let mut held = slow();
    held.advance();
    assert_eq!((held.kill().how, ENDED_OUTSIDE.get()), (How::Killed, 1));
    let mut parked = slow();
    assert_eq!((parked.kill().how, ENDED_OUTSIDE.get()), (How::Killed, 1));
}

/// Ends as its input says.
#[derive(Serialize, Deserialize)]
struct Fail {
    how: String,
}

impl Process for Fail {
    fn start(input: &Value) -> Result<Self, Error> {
        read_input(input)
    }

    async fn advance(&mut self, context: &Context) -> Result<Advance, Error> {
        context.log(format!("try {}", context.try_number()));
        match self.how.as_str() {
            "failed" => Err(Error::Failed("no luck".into())),
            "stuck" => Err(Error::Stuck("the disk is full".into())),
            "interrupted" => Err(Error::Interrupted("a bump".into())),
            "panic" => panic!("at once"),
            "exit" => Ok(Advance::Finished { exit: 3 }),
            "loop" => Ok(Advance::Again),
            how => Err(Error::Input(format!("`how`: {how}"))),
        }
    }
}

fn fail(how: &str, more: &str) -> Harness {
    let mut registry = Registry::new();
    registry.register::<Fail>("my.fail");
    Harness::from_spec(&registry, &format!("call: my.fail\nwith: {{how: {how}}}\n{more}"))
}

#[test]
fn errors_have_the_effects_that_they_have_on_a_worker() {
    let mut failed = fail("failed", "retry: {max: 3, wait: 30s}");
    let retried = Step::Retried { reason: "no luck".into(), pause: Duration::from_secs(30) };
    assert_eq!((failed.advance(), failed.advance()), (retried.clone(), retried));
    let end = failed.run_to_end();
    assert_eq!((end.how, end.reason.as_deref(), failed.try_number()), (How::Excepted, Some("no luck"), 3));
    assert_eq!(failed.elapsed(), Duration::from_secs(60));
    assert_eq!(failed.log(), ["try 1", "try 2", "try 3"]);

    let mut stuck = fail("stuck", "");
    assert_eq!(stuck.advance(), Step::Paused { reason: "the disk is full".into() });
    stuck.play();
    assert_eq!(stuck.advance(), Step::Paused { reason: "the disk is full".into() });

    assert_eq!(fail("interrupted", "").advance(), Step::GivenBack { reason: "a bump".into() });
    let panicked = fail("panic", "retry: {max: 3}").run_to_end();
    assert_eq!((panicked.how, panicked.reason.as_deref()), (How::Excepted, Some("it panicked: at once")));
    let exit = fail("exit", "").run_to_end();
    assert_eq!((exit.how, exit.exit, exit.ok, exit.reason.as_deref()), (How::Finished, Some(3), false, Some("exit 3")));
    assert!(fail("loop", "").run_to_end().reason.unwrap().contains("without any progress"));
}

/// Writes a text at a site and reads it back.
#[derive(Serialize, Deserialize)]
struct AtSite;

impl Process for AtSite {
    fn start(_input: &Value) -> Result<Self, Error> {
        Ok(AtSite)
    }

    async fn advance(&mut self, context: &Context) -> Result<Advance, Error> {
        let site = context.site("cluster").await?;
        let output = site.exec("cat > text; wc -w < text", b"one two three", Duration::from_secs(60)).await?;
        let words = output.ok().map_err(Error::failed)?;
        context.set_value("words", String::from_utf8_lossy(&words).trim());
        Ok(Advance::Finished { exit: 0 })
    }
}

#[test]
fn site_is_a_local_folder_that_can_be_away() {
    let folder = tempfile::tempdir().unwrap();
    let mut process = Harness::new::<AtSite>(json!({}));
    process.add_site("cluster", folder.path());
    process.set_site_up("cluster", false);
    assert!(matches!(process.advance(), Step::Waits(_)));
    process.set_site_up("cluster", true);
    assert_eq!(process.crash_at_await(1), None);
    assert_eq!(process.run_to_end().values["words"], "3");
    let text = folder.path().join(format!("p/{}/1/text", process.pid()));
    assert_eq!(std::fs::read_to_string(text).unwrap(), "one two three");

    let end = Harness::new::<AtSite>(json!({})).run_to_end();
    assert_eq!(
        end.reason.as_deref(),
        Some("this test has no site `cluster`; add it with `Harness::add_site`"),
        "the text says what to do"
    );
}

/// [`Count`], one version later.
#[derive(Serialize, Deserialize)]
struct LaterCount {
    to: u32,
    #[serde(default)]
    done: u32,
    #[serde(default)]
    skipped: u32,
}

/// The same without a default for the later field.
#[derive(Serialize, Deserialize)]
struct BrokenCount {
    to: u32,
    done: u32,
    skipped: u32,
}

macro_rules! counts {
    ($kind:ty) => {
        impl Process for $kind {
            fn start(input: &Value) -> Result<Self, Error> {
                read_input(input)
            }

            async fn advance(&mut self, context: &Context) -> Result<Advance, Error> {
                self.done += 1;
                context.set_value("done", self.done);
                context.set_value("skipped", self.skipped);
                Ok(if self.done >= self.to { Advance::Finished { exit: 0 } } else { Advance::Again })
            }
        }
    };
}

counts!(LaterCount);
counts!(BrokenCount);

/// Written once by [`Count`] after two of five advances.
const GOLDEN: &str = "tests/golden/count.checkpoint";

#[test]
fn golden_file_of_an_older_shape_is_read_with_defaults() {
    let mut old = count(5);
    old.advance();
    old.advance();
    old.keep_golden(GOLDEN);
    let mut later = Harness::from_golden::<LaterCount>(json!({"to": 5}), GOLDEN).unwrap();
    assert_eq!((later.advances(), later.values()["done"].clone()), (2, json!(2)));
    let end = later.run_to_end();
    assert_eq!(Value::Object(end.values), json!({"done": 5, "skipped": 0}));
    assert_eq!(later.advances(), 5);
}

#[test]
fn golden_file_that_the_present_shape_cannot_read_is_refused_with_the_reason() {
    let refused = |harness: Result<Harness, NotRestored>| harness.err().unwrap().to_string();
    let text = refused(Harness::from_golden::<BrokenCount>(json!({"to": 5}), GOLDEN));
    assert!(text.contains("missing field `skipped`") && text.contains("#[serde(default)]"), "{text}");
    let text = refused(Harness::from_golden::<Count>(json!({"to": 5}), "tests/golden/none"));
    assert_eq!(text, "cannot read tests/golden/none");
    let text = refused(Harness::from_golden::<Count>(json!({"to": 5}), [0xff, 1].as_slice()));
    assert!(text.starts_with("not a checkpoint: "), "{text}");
}

#[test]
fn golden_file_is_never_written_silently_or_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("count.checkpoint");
    let mut process = count(5);
    process.advance();
    if std::env::var_os("BATON_WRITE_GOLDEN").is_none() {
        let kept = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| process.keep_golden(&path)));
        let text = kept.unwrap_err().downcast::<String>().unwrap();
        assert!(text.contains("BATON_WRITE_GOLDEN=1") && !path.exists(), "{text}");
    }
    std::fs::write(&path, "as it is").unwrap();
    process.keep_golden(&path);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "as it is");
}

#[test]
#[should_panic(expected = "the registry has no kind `my.other`")]
fn kind_that_the_registry_does_not_have_is_named() {
    Harness::from_spec(&Registry::new(), "call: my.other");
}

/// Runs a closure on the blocking pool in each advance; it panics in the fourth.
#[derive(Default, Serialize, Deserialize)]
struct Blocking {
    done: u32,
}

impl Process for Blocking {
    fn start(_input: &Value) -> Result<Self, Error> {
        Ok(Self::default())
    }

    async fn advance(&mut self, context: &Context) -> Result<Advance, Error> {
        self.done += 1;
        let fails = self.done == 4;
        context.blocking(move || assert!(!fails, "too hot")).await?;
        Ok(Advance::Again)
    }
}

#[test]
fn blocking_suspends_once_however_short_the_closure_is_and_names_its_panic() {
    let mut blocking = Harness::new::<Blocking>(json!({}));
    for _ in 0..3 {
        for _ in 0..20 {
            assert_eq!(blocking.crash_at_await(1), None, "it did not suspend");
        }
        assert_eq!(blocking.crash_at_await(2), Some(Step::Again), "it suspended twice");
    }
    let Step::Ended(end) = blocking.advance() else { panic!("the closure panics") };
    assert_eq!(end.reason.as_deref(), Some("a closure of `blocking` panicked: too hot"));
}

#[test]
fn wait_continues_after_a_pause() {
    let mut count = count(4);
    for _ in 0..3 {
        count.advance();
    }
    count.pause();
    count.play();
    count.advance();
    assert_eq!(count.elapsed(), Duration::from_secs(3600));
}
