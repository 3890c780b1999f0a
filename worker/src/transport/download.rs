//! Files that come from a site: one stream each, from where an earlier one was cut. A stream takes half the time of SFTP's
//! requests and their answers.

use std::path::Path;

use baton_common::digest::Digest;

use super::landing::Landing;
use super::{Error, Output, SILENCE_LIMIT, Session, quote_path};

/// Fetches one file, as it is while it comes: whoever calls compares SHA-256. See [`Session::get`].
pub(super) async fn get(
    session: &Session,
    from: &str,
    to: &Path,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<Digest, Error> {
    let source = quote_path(from);
    let said = session.exec(&format!("wc -c < {source}"), b"", SILENCE_LIMIT).await?;
    ended_well(&said, from)?;
    let size = String::from_utf8_lossy(&said.stdout).trim().parse();
    let size = size.map_err(|_| Error::file(from, "it has no length"))?;
    let mut target = Landing::open(to, size, progress).await?;
    if !target.is_whole() {
        let command = format!("{{ dd bs=1 count=0 skip={} 2> /dev/null; cat; }} < {source}", target.done);
        let read = session.receive(&command, &mut target).await;
        match read {
            Ok(output) => ended_well(&output, from)?,
            // What comes beyond its length is no part of it any more.
            Err(_) if target.is_whole() => {}
            Err(error) => return Err(target.fault().await.unwrap_or(error)),
        }
    }
    target.finish(to).await
}

fn ended_well(output: &Output, from: &str) -> Result<(), Error> {
    match output.exit {
        Some(0) => Ok(()),
        // It says nothing of the file that somebody there ends commands.
        None | Some(128..) => Err(Error::Broken("what reads the file was ended there".to_owned())),
        Some(_) => Err(Error::file(from, output.reason().unwrap_or_else(|| "it could not be read".to_owned()))),
    }
}
