//! `baton doctor`: checks what is reachable, prints versions, problems and remedies.

use std::time::Duration;

use baton_common::communicator::Broker;
use baton_common::config;
use baton_common::exit;
use baton_common::objects::{self, Objects};
use baton_common::sharing;
use baton_common::store::measure::Connections;
use baton_common::store::query::queue_name;
use baton_common::store::{self, Location, Store, WORKER_CONNECTIONS};
use baton_worker::cli::chain;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::cli::{Global, Output};
use crate::client::{DATABASE_FILE, objects_of, one_connection};
use crate::failure::{Failure, broker_remedy, objects_code};
use crate::output::{self, one_line, span};
use crate::overview::Overview;

/// Time limit for storing and fetching a small object.
const OBJECTS_LIMIT: Duration = Duration::from_secs(20);

/// Maximum length of a worker's error about its object store, in characters.
const TEXT_CHARS_MAX: usize = 600;

/// Maximum length of a site's last error, in characters.
const ERROR_CHARS_MAX: usize = 200;

/// The result of one check.
struct Finding {
    what: &'static str,
    verdict: Verdict,
    text: String,
    remedy: Option<String>,
}

#[derive(Clone, Copy, PartialEq)]
enum Verdict {
    Ok,
    Warn,
    Fail(u8),
}

pub(crate) async fn run(global: &Global) -> Result<u8, Failure> {
    let resolved = global.connection.resolve()?;
    let mut findings = vec![finding("program", Verdict::Ok, format!("baton {}", env!("CARGO_PKG_VERSION")), None)];
    let home = global.home.join(DATABASE_FILE);
    let location = match resolved.database_url.as_deref() {
        Some(url) => Some(Location::parse(url)),
        None if home.exists() => Some(Ok(Location::Sqlite(home))),
        None => None,
    };
    let store = match location {
        None => {
            findings.push(finding(
                "database",
                Verdict::Warn,
                "none is configured; only `baton run` works".into(),
                Some("set BATON_DATABASE_URL, `database.url` in baton.toml or --database-url"),
            ));
            None
        }
        Some(Err(error)) => {
            findings.push(database_failure(&error));
            None
        }
        Some(Ok(location)) => match Store::open_as(location, one_connection()).await {
            Ok(store) => {
                let version = store.server_version().await?;
                findings.push(finding("database", Verdict::Ok, format!("{version}, schema up to date"), None));
                findings.extend(store.connections().await?.map(connections));
                Some(store)
            }
            Err(error) => {
                findings.push(database_failure(&error));
                None
            }
        },
    };
    // The database of `baton run` has no broker.
    let database = match &store {
        Some(store) if !store.is_embedded() => Some(store.identity().await?),
        Some(_) | None => None,
    };
    findings.extend(brokers(&resolved.broker_urls, database).await);
    if let Ok(config) = objects_of(global, &resolved) {
        let found = objects(&config).await;
        let is_usable = found.verdict == Verdict::Ok;
        findings.push(found);
        if let Some(store) = store.as_ref().filter(|_| is_usable) {
            findings.extend(foreign(store, &config).await);
        }
    }
    if let Some(store) = &store {
        findings.extend(without_objects(store).await?);
        findings.extend(workers(store).await?);
        findings.extend(sites(store).await?);
    }
    print(global, &findings)?;
    let code = findings.iter().find_map(|finding| match finding.verdict {
        Verdict::Fail(code) => Some(code),
        Verdict::Ok | Verdict::Warn => None,
    });
    Ok(code.unwrap_or(exit::OK))
}

fn finding(what: &'static str, verdict: Verdict, text: String, remedy: Option<&str>) -> Finding {
    Finding { what, verdict, text, remedy: remedy.map(str::to_owned) }
}

fn database_failure(error: &store::Error) -> Finding {
    let remedy = match error {
        store::Error::Url | store::Error::UrlParts(_) => "use postgres://USER:PASSWORD@HOST:PORT/NAME or sqlite:PATH",
        store::Error::Unreachable(_) | store::Error::Retry(_) => "start it, or correct the host and port",
        store::Error::Refused(_) => "correct the user, password or database name, or grant the permission",
        store::Error::SchemaNewer { .. } | store::Error::Newer { .. } => {
            "install the newer version of Baton on this machine"
        }
        store::Error::Folder { .. } => "create the folder, or set another one with --home",
        store::Error::Full(_) => "raise max_connections of the server, or stop programs that use its connections",
        store::Error::Unreadable(_)
        | store::Error::NoRow
        | store::Error::Stopped
        | store::Error::Rejected(_)
        | store::Error::Database(_) => "see the log of the database server",
    };
    finding("database", Verdict::Fail(exit::of_store(error)), error.to_string(), Some(remedy))
}

/// Reports for how many more workers the database has connections. Counts the connections that live workers may still open.
fn connections(connections: Connections) -> Finding {
    let Connections { usable, others, n_workers } = connections;
    let each = i64::from(WORKER_CONNECTIONS);
    let n_more = ((usable - others - n_workers * each) / each).max(0);
    let text = format!(
        "{usable} usable, {others} in use by other programs, up to {each} for each of {n_workers} workers; room for {n_more} \
         more workers"
    );
    let (verdict, remedy) = if n_more == 0 {
        (Verdict::Warn, Some("raise max_connections of the server before starting more workers"))
    } else {
        (Verdict::Ok, None)
    };
    finding("connections", verdict, text, remedy)
}

/// Returns a finding for each broker. An unusable broker is a failure only if no broker is usable.
async fn brokers(urls: &[String], database: Option<Uuid>) -> Vec<Finding> {
    if urls.is_empty() {
        let text = "none is configured; workers need one, `baton run` does not";
        let remedy = "set BATON_BROKER_URL, `broker.url` in baton.toml or --broker-url";
        return vec![finding("broker", Verdict::Warn, text.into(), Some(remedy))];
    }
    let checks = Broker::check(urls, database).await;
    let is_any_usable = checks.iter().any(Result::is_ok);
    let is_one = urls.len() == 1;
    let findings = checks.into_iter().map(|check| match check {
        Ok(info) => {
            let host = if is_one { String::new() } else { format!("{}: ", info.url) };
            let cluster = info.cluster.map(|cluster| format!(", cluster {cluster}")).unwrap_or_default();
            finding("broker", Verdict::Ok, format!("{host}{}{cluster}", info.version), None)
        }
        Err(error) => {
            let (code, remedy) = broker_remedy(&error);
            let verdict = if is_any_usable { Verdict::Warn } else { Verdict::Fail(code) };
            finding("broker", verdict, error.to_string(), Some(remedy))
        }
    });
    findings.collect()
}

/// Checks the object store: stores, fetches and removes a small object.
async fn objects(config: &config::Objects) -> Finding {
    let objects = match Objects::open_existing(config) {
        Ok(Some(objects)) => objects,
        Ok(None) => {
            return finding("objects", Verdict::Ok, "no folder yet; the first stored file creates it".into(), None);
        }
        Err(error) => return unusable(&error),
    };
    let there_and_back = async {
        let probe = format!("baton doctor {}\n", uuid::Uuid::new_v4());
        let digest = objects.put_bytes(probe.clone().into_bytes()).await?;
        objects.get_bytes(digest, probe.len() as u64).await?;
        objects.delete(digest).await
    };
    match tokio::time::timeout(OBJECTS_LIMIT, there_and_back).await {
        Ok(Ok(())) => finding("objects", Verdict::Ok, objects.location(), None),
        Ok(Err(error)) => unusable(&error),
        Err(_) => {
            let text = format!("{} did not answer within {} s", objects.location(), OBJECTS_LIMIT.as_secs());
            finding(
                "objects",
                Verdict::Fail(exit::UNREACHABLE),
                text,
                Some("correct `objects` in baton.toml, or check the network"),
            )
        }
    }
}

/// Returns a finding if the object store is not the one that the fleet shares.
async fn foreign(store: &Store, config: &config::Objects) -> Option<Finding> {
    let objects = Objects::open_existing(config).ok()?;
    let foreign = match tokio::time::timeout(OBJECTS_LIMIT, sharing::look(store, objects.as_ref())).await {
        Ok(Ok(foreign)) => foreign?,
        // Another finding reports a store that does not answer.
        Ok(Err(_)) | Err(_) => return None,
    };
    Some(finding("objects", Verdict::Fail(exit::REFUSED), foreign.text, Some(&foreign.remedy)))
}

/// Returns a finding for each live worker that cannot use the object store of the fleet.
async fn without_objects(store: &Store) -> Result<Vec<Finding>, Failure> {
    let workers = store.without_objects().await?;
    let findings = workers.into_iter().map(|(name, why)| {
        let text = format!("worker {name} does not run processes with files: {}", one_line(&why, TEXT_CHARS_MAX));
        finding(
            "objects",
            Verdict::Fail(exit::FAILED),
            text,
            Some("correct `objects` in the configuration of that worker"),
        )
    });
    Ok(findings.collect())
}

fn unusable(error: &objects::Error) -> Finding {
    finding(
        "objects",
        Verdict::Fail(objects_code(error)),
        chain(error),
        Some("check `objects` in baton.toml; the access keys are read from the environment"),
    )
}

/// Returns findings about the sites of the fleet.
async fn sites(store: &Store) -> Result<Vec<Finding>, Failure> {
    let sites = store.sites(None).await?;
    if sites.is_empty() {
        return Ok(vec![]);
    }
    let (served, unserved): (Vec<_>, Vec<_>) = sites.iter().partition(|site| site.is_served);
    let down = served.iter().filter_map(|site| Some((site, site.retry_in?)));
    let mut findings: Vec<Finding> = down
        .map(|(site, retry_in)| {
            let error = one_line(site.last_error.as_deref().unwrap_or_default(), ERROR_CHARS_MAX);
            let text = format!("{} is unreachable: {error}; Baton reconnects in {}", site.name, span(retry_in));
            finding("sites", Verdict::Warn, text, Some(&format!("baton site test {}", site.name)))
        })
        .collect();
    let n_up = served.len() - findings.len();
    findings.extend(unserved.iter().map(|site| {
        let text = format!("no live worker serves {}", site.name);
        finding("sites", Verdict::Warn, text, Some("start a worker that has the site in its configuration"))
    }));
    if n_up > 0 {
        findings.push(finding("sites", Verdict::Ok, format!("{n_up} up"), None));
    }
    Ok(findings)
}

/// Returns a finding for each worker that lacks a resource, and one for all workers.
async fn workers(store: &Store) -> Result<Vec<Finding>, Failure> {
    let overview = Overview::look(store).await?;
    let lacking = overview.workers.iter().filter_map(|worker| Some((worker, worker.lacks.as_ref()?)));
    let mut findings: Vec<Finding> = lacking
        .map(|(worker, lacks)| {
            let text = format!("{} on {} {lacks}", worker.name, worker.host);
            finding("workers", Verdict::Fail(exit::FAILED), text, Some(lacks.remedy()))
        })
        .collect();
    findings.push(all_workers(&overview));
    Ok(findings)
}

fn all_workers(overview: &Overview) -> Finding {
    let workers = &overview.workers;
    if let Some(backlog) = overview.unserved().next() {
        let queue = &backlog.queue;
        let text = format!("{} live, but none claims from queue `{queue}`, which has queued processes", workers.len());
        let remedy = format!("baton-worker --queue {}", queue_name(queue));
        return finding("workers", Verdict::Warn, text, Some(&remedy));
    }
    let blocked = workers.iter().filter_map(|worker| worker.blocked.as_ref()).count();
    if blocked > 0 {
        let text = format!("{} live, {blocked} of them with a process that blocks its thread", workers.len());
        return finding("workers", Verdict::Warn, text, Some("`baton workers` shows the process"));
    }
    match workers.len() {
        0 => finding("workers", Verdict::Warn, "none is live".into(), Some("start one: baton-worker")),
        count => finding("workers", Verdict::Ok, format!("{count} live"), None),
    }
}

fn print(global: &Global, findings: &[Finding]) -> Result<(), Failure> {
    let word = |verdict| match verdict {
        Verdict::Ok => "ok",
        Verdict::Warn => "warn",
        Verdict::Fail(_) => "fail",
    };
    if global.output == Output::Json {
        let values = findings.iter().map(|finding| {
            json!({
                "what": finding.what,
                "verdict": word(finding.verdict),
                "text": finding.text,
                "remedy": finding.remedy,
            })
        });
        return output::print_json(&Value::Array(values.collect()));
    }
    for finding in findings {
        output::print(&format!("{:<5} {:<9} {}", word(finding.verdict), finding.what, finding.text))?;
        if let Some(remedy) = &finding.remedy {
            output::print(&format!("{:<15} {remedy}", ""))?;
        }
    }
    Ok(())
}
