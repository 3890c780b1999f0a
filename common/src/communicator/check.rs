//! Checks a broker, for `baton doctor`.

use std::collections::BTreeMap;

use async_rs::TokioRuntime;
use futures_util::{AsyncReadExt, AsyncWriteExt};
use lapin::tcp::{AMQPUriTcpExt, OwnedTLSConfig};
use tokio::time::timeout;
use uuid::Uuid;

use super::link::{ANSWER_LIMIT, close, masked, open_for, parse};
use super::{BrokerInfo, CheckError};

/// Most bytes that are read of the broker's first frame, which has some 500.
const START_BYTES_MAX: usize = 64 * 1024;

/// Tries one URL once.
pub(super) async fn check(url: &str, database: Option<Uuid>) -> Result<BrokerInfo, CheckError> {
    let connection = open_for(url, "baton check", None, database).await?;
    close(&connection).await;
    let properties = match timeout(ANSWER_LIMIT, ask_properties(url)).await {
        Ok(properties) => properties?,
        Err(_) => BTreeMap::new(),
    };
    let text = |name: &str| properties.get(name).cloned();
    let product = text("product").unwrap_or_else(|| "unknown broker".to_owned());
    let version = text("version").map_or_else(|| product.clone(), |version| format!("{product} {version}"));
    Ok(BrokerInfo { url: masked(&parse(url)?), version, cluster: text("cluster_name") })
}

/// The text properties in the broker's first frame, which lapin does not expose.
async fn ask_properties(url: &str) -> Result<BTreeMap<String, String>, CheckError> {
    let uri = parse(url)?;
    let runtime = TokioRuntime::tokio_with_handle(tokio::runtime::Handle::current());
    let ask = async {
        let mut stream = uri.connect_with_config_async(OwnedTLSConfig::default().as_ref(), &runtime).await?;
        stream.write_all(b"AMQP\x00\x00\x09\x01").await?;
        stream.flush().await?;
        let mut head = [0; 7];
        stream.read_exact(&mut head).await?;
        let n_bytes = u32::from_be_bytes([head[3], head[4], head[5], head[6]]) as usize;
        let mut payload = vec![0; n_bytes.min(START_BYTES_MAX)];
        stream.read_exact(&mut payload).await?;
        Ok(payload)
    };
    let payload = ask
        .await
        .map_err(|error: std::io::Error| CheckError::Unreachable { url: masked(&uri), reason: error.to_string() })?;
    Ok(read_texts(&payload).unwrap_or_default())
}

/// Reads the texts of a `connection.start` method: six bytes of class, method and version, then a table.
fn read_texts(payload: &[u8]) -> Option<BTreeMap<String, String>> {
    let mut rest = payload.get(6..)?;
    let n_bytes = u32::from_be_bytes(take(&mut rest, 4)?.try_into().ok()?) as usize;
    let mut table = take(&mut rest, n_bytes)?;
    let mut texts = BTreeMap::new();
    while !table.is_empty() {
        let n_bytes = usize::from(take(&mut table, 1)?[0]);
        let name = String::from_utf8_lossy(take(&mut table, n_bytes)?).into_owned();
        let n_bytes = match take(&mut table, 1)?[0] {
            b'S' | b'F' => u32::from_be_bytes(take(&mut table, 4)?.try_into().ok()?) as usize,
            b't' => 1,
            // Brokers send no other types here. The rest after an unknown type cannot be read.
            _ => return Some(texts),
        };
        let value = take(&mut table, n_bytes)?;
        texts.insert(name, String::from_utf8_lossy(value).into_owned());
    }
    Some(texts)
}

fn take<'a>(rest: &mut &'a [u8], n_bytes: usize) -> Option<&'a [u8]> {
    let (head, tail) = rest.split_at_checked(n_bytes)?;
    *rest = tail;
    Some(head)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_read_from_the_first_frame_and_a_truncated_frame_does_not_panic() {
        let mut table = Vec::new();
        table.extend(b"\x07versionS\x00\x00\x00\x063.10.8");
        table.extend(b"\x04flagt\x01");
        let mut payload = vec![0, 10, 0, 10, 0, 9];
        payload.extend(u32::try_from(table.len()).unwrap().to_be_bytes());
        payload.extend(&table);
        assert_eq!(read_texts(&payload).unwrap()["version"], "3.10.8");
        for cut in 0..payload.len() {
            assert!(read_texts(&payload[..cut]).is_none());
        }
    }
}
