//! Credentials: what proves to others who somebody is.
//!
//! An identity is a folder with the files of a Kubernetes TLS secret: `ca.crt`, the authority that all trust; `tls.crt` and
//! `tls.key`, a certificate of that authority with its key; and `token`, a secret that lets workers in that have no
//! certificate. `unisono cert` makes such folders; another authority's certificates do as well, with the names of [`Role`].

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// The authority's certificates, in PEM.
pub const CA: &str = "ca.crt";
/// The certificate, then those between it and the authority's, in PEM.
pub const CERTIFICATE: &str = "tls.crt";
/// Its key, in PEM.
pub const KEY: &str = "tls.key";
/// A join token, in one line.
pub const TOKEN: &str = "token";
/// The environment variable that holds a join token instead of the file.
pub const TOKEN_VARIABLE: &str = "UNISONO_TOKEN";
/// A DNS name of a coordinator's certificate, for workers that are told its address beside it: it is the same at whatever address.
pub const COORDINATOR_NAME: &str = "coordinator.unisono";
/// Characters of a token, at least.
const LEAST: usize = 16;

/// What a certificate may do: it is valid for the DNS name of each of its roles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Joins runs.
    Worker,
    /// Drains workers, and stops runs.
    Operator,
}

impl Role {
    /// The DNS name that says it.
    pub fn name(self) -> &'static str {
        match self {
            Role::Worker => "worker.unisono",
            Role::Operator => "operator.unisono",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Worker => "worker",
            Role::Operator => "operator",
        })
    }
}

/// A join token. It is never shown.
#[derive(Clone)]
pub struct Token(String);

impl Token {
    /// The token of a text.
    ///
    /// # Errors
    /// One that is too short, or cannot be sent in a header.
    pub fn new(text: &str) -> Result<Token, &'static str> {
        let text = text.trim();
        match text {
            "" => Err("it is empty"),
            text if !text.bytes().all(|b| b.is_ascii_graphic()) => {
                Err("it has characters other than ASCII's letters, digits and signs")
            }
            text if text.len() < LEAST => Err("it is shorter than 16 characters"),
            text => Ok(Token(text.into())),
        }
    }

    /// The value of a request's header `authorization` (RFC 6750).
    pub fn header(&self) -> String {
        format!("Bearer {}", self.0)
    }

    /// Whether a header is this token's; how long it takes does not depend on where they differ.
    pub fn is(&self, header: &[u8]) -> bool {
        // Digests are compared in constant time.
        blake3::hash(self.header().as_bytes()) == blake3::hash(header)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// A certificate with its key, in PEM. The key is never shown.
#[derive(Clone)]
pub struct Certificate {
    pub chain: Vec<u8>,
    pub key: Vec<u8>,
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Certificate(..)")
    }
}

/// An identity, as it was read.
#[derive(Clone, Debug)]
pub struct Identity {
    pub folder: PathBuf,
    /// The authority's certificates, in PEM.
    pub ca: Vec<u8>,
    pub certificate: Option<Certificate>,
    pub token: Option<Token>,
    /// The name that the coordinator must prove, where it is not the host of its URL.
    pub coordinator: Option<&'static str>,
}

/// Why an identity cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("there is no folder {0}: make one with `unisono cert`, or correct --identity")]
    NoFolder(PathBuf),
    #[error("cannot read {path}: {why}; {hint}")]
    Read { path: PathBuf, why: io::Error, hint: &'static str },
    #[error("{0} holds several identities: name one of them, as in {0}/worker")]
    Several(PathBuf),
    #[error(
        "{0} has neither {CERTIFICATE} with {KEY} nor {TOKEN}, and {TOKEN_VARIABLE} is not set: make one of them with `unisono cert`"
    )]
    Nothing(PathBuf),
    #[error("the join token in {place} cannot be used: {why}; make one with `unisono cert`")]
    Token { place: String, why: &'static str },
    #[error("{path} cannot be used: {why}; make another with `unisono cert`")]
    Pem { path: PathBuf, why: String },
}

impl Identity {
    /// Reads the files of a folder; a token of the environment goes before that of the folder.
    ///
    /// # Errors
    /// Files that are missing, cannot be read, or are none of these.
    pub fn open(folder: &Path) -> Result<Identity, IdentityError> {
        if !folder.is_dir() {
            return Err(IdentityError::NoFolder(folder.into()));
        }
        let read = |name: &str, hint| {
            let path = folder.join(name);
            std::fs::read(&path).map_err(|why| IdentityError::Read { path, why, hint })
        };
        if !folder.join(CA).exists() && folder.join("worker").join(CA).exists() {
            return Err(IdentityError::Several(folder.into()));
        }
        let ca = read(CA, "it is the certificate of the authority that signed the others, which `unisono cert` makes")?;
        let has = |name: &str| folder.join(name).exists();
        let certificate = if has(CERTIFICATE) || has(KEY) {
            let hint = "a certificate needs its key, and a key its certificate";
            Some(Certificate { chain: read(CERTIFICATE, hint)?, key: read(KEY, hint)? })
        } else {
            None
        };
        let token = match std::env::var(TOKEN_VARIABLE) {
            Ok(text) if !text.is_empty() => Some((text, TOKEN_VARIABLE.to_string())),
            _ if has(TOKEN) => {
                let text = read(TOKEN, "check its permissions")?;
                Some((String::from_utf8_lossy(&text).into(), folder.join(TOKEN).display().to_string()))
            }
            _ => None,
        };
        let token = token.map(|(text, place)| Token::new(&text).map_err(|why| IdentityError::Token { place, why }));
        let identity =
            Identity { folder: folder.into(), ca, certificate, token: token.transpose()?, coordinator: None };
        if identity.certificate.is_none() && identity.token.is_none() {
            return Err(IdentityError::Nothing(folder.into()));
        }
        Ok(identity)
    }

    /// The error of one of its files.
    pub fn wrong(&self, file: &str, why: impl fmt::Display) -> IdentityError {
        IdentityError::Pem { path: self.folder.join(file), why: why.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_itself_and_never_shown() {
        let token = Token::new(" 0123456789abcdef\n").expect("a token");
        assert!(token.is(b"Bearer 0123456789abcdef"));
        for other in
            ["Bearer 0123456789abcdeF", "Bearer 0123456789abcde", "bearer 0123456789abcdef", "0123456789abcdef", ""]
        {
            assert!(!token.is(other.as_bytes()), "{other}");
        }
        let identity = Identity {
            folder: "x".into(),
            ca: Vec::new(),
            certificate: Some(Certificate { chain: b"chain".to_vec(), key: b"secret-key".to_vec() }),
            token: Some(token),
            coordinator: None,
        };
        let shown = format!("{identity:?} {identity:#?}");
        assert!(!shown.contains("0123456789") && !shown.contains("115, 101, 99"), "{shown}");
        for bad in ["", "  \n", "short", "0123456789abcde", "0123456789 abcdef", "0123456789abcdéf"] {
            assert!(Token::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_is_missing_in_a_folder_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let says = |path: &Path, words: &[&str]| {
            let error = Identity::open(path).expect_err("it is whole").to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{words:?}: {error}");
        };
        says(&folder.path().join("none"), &["none", "unisono cert", "--identity"]);
        let put = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).expect("written");
        says(folder.path(), &["ca.crt", "unisono cert"]);
        put(CA, "ca");
        says(folder.path(), &["tls.crt", "tls.key", "token", "UNISONO_TOKEN"]);
        put(TOKEN, "short");
        says(folder.path(), &["token", "shorter than 16"]);
        put(TOKEN, "0123456789abcdef\n");
        assert!(Identity::open(folder.path()).expect("a token is enough").certificate.is_none());
        put(KEY, "key");
        says(folder.path(), &["tls.crt", "needs its key"]);
        put(CERTIFICATE, "certificate");
        assert_eq!(Identity::open(folder.path()).expect("whole").certificate.expect("one").key, b"key");
    }
}
