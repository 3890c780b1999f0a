//! `baton sites`.

use baton_common::exit;
use baton_common::store::site::SiteFacts;
use serde_json::{Value, json};

use crate::cli::{Global, Output, SitesArguments};
use crate::client::Client;
use crate::failure::Failure;
use crate::output::{self, one_line, site_state, span, timestamp};

/// Maximum length of an error in the table, in characters.
const ERROR_CHARS_MAX: usize = 80;

pub(crate) async fn run(global: &Global, arguments: SitesArguments) -> Result<u8, Failure> {
    let client = Client::open(global).await?;
    let now = client.store.now().await?;
    let sites = client.store.sites(arguments.name.as_deref()).await?;
    client.close().await;
    if let Some(name) = &arguments.name
        && sites.is_empty()
    {
        return Err(Failure::new(exit::NOT_FOUND, format!("no worker has registered a site `{name}`"))
            .with_remedy("configure it for the workers as [sites.NAME]"));
    }
    match global.output {
        Output::Json => output::print_json(&Value::Array(sites.iter().map(json_of).collect()))?,
        Output::Ids => sites.iter().try_for_each(|site| output::print(&site.name))?,
        Output::Table => output::print(&text(&sites, now))?,
    }
    Ok(exit::OK)
}

fn text(sites: &[SiteFacts], now: i64) -> String {
    if sites.is_empty() {
        return "no worker has registered a site; sites are configured for the workers as [sites.NAME]".to_owned();
    }
    let mut table = output::table(&[
        "NAME",
        "LAUNCHER",
        "STATE",
        "SESSIONS",
        "JOBS",
        "WAIT-SESSION",
        "WAIT-ROOM",
        "WATCHED-BY",
        "LOOKED",
        "LAST-ERROR",
    ]);
    for site in sites {
        let state = match site.retry_in {
            Some(micros) if site.is_served => format!("down, reconnects in {}", span(micros)),
            Some(_) | None => site_state(site).to_owned(),
        };
        let error = site.last_error.as_deref().map(|error| {
            let ago = site.last_error_at.map(|at| format!("{} ago: ", span(now - at))).unwrap_or_default();
            format!("{ago}{}", one_line(error, ERROR_CHARS_MAX))
        });
        table.add_row([
            site.name.clone(),
            site.launcher.clone(),
            state,
            if site.slots == 0 { "local".to_owned() } else { format!("{} of {}", site.slots_taken, site.slots) },
            site.jobs.to_string(),
            site.waiting_for_slot.to_string(),
            site.waiting_for_room.to_string(),
            site.watcher.clone().unwrap_or_default(),
            site.polled_at.map(|at| format!("{} ago", span(now - at))).unwrap_or_default(),
            error.unwrap_or_default(),
        ]);
    }
    table.trim_fmt()
}

fn json_of(site: &SiteFacts) -> Value {
    json!({
        "name": site.name,
        "launcher": site.launcher,
        "root": site.root,
        "state": site_state(site),
        "retry_in_ms": site.retry_in.map(|micros| micros / 1000),
        "failures": site.failures,
        "sessions": site.slots_taken,
        "sessions_max": site.slots,
        "jobs": site.jobs,
        "waiting_for_session": site.waiting_for_slot,
        "waiting_for_room": site.waiting_for_room,
        "watcher": site.watcher,
        "looked_at": site.polled_at.map(timestamp),
        "last_error": site.last_error,
        "last_error_at": site.last_error_at.map(timestamp),
    })
}
