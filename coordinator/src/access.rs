//! Who may do what: the certificate that a peer has shown, or its join token, against what it asks for.

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme};
use std::sync::Arc;
use tonic::Status;
use tonic::metadata::MetadataMap;
use unisono_proto::identity::{CA, CERTIFICATE, Identity, IdentityError, KEY, Role, Token};
use unisono_proto::tls::{self, certificates};
use webpki::KeyUsage;

/// How a coordinator proves who it is, and finds out who others are.
pub struct Tls {
    pub config: Arc<ServerConfig>,
    verifier: Arc<dyn ClientCertVerifier>,
    /// Lets workers in that have no certificate.
    pub token: Option<Token>,
}

/// What is known of a peer by its connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The coordinator asks nobody who it is.
    Anybody,
    /// It has shown no certificate.
    Stranger,
    /// It has shown one that is not accepted.
    Refused(String),
    /// It has shown one with these roles.
    Known(Vec<Role>),
}

impl Tls {
    /// From an identity that has a certificate.
    ///
    /// # Errors
    /// Files that hold something else, and none where one is needed.
    pub fn new(identity: &Identity) -> Result<Tls, IdentityError> {
        let Some(pem) = &identity.certificate else {
            return Err(identity.wrong(CERTIFICATE, "a coordinator needs a certificate, and there is none"));
        };
        let roots = tls::authorities(identity)?;
        let chain = certificates(identity, CERTIFICATE, &pem.chain)?;
        let key = PrivateKeyDer::from_pem_slice(&pem.key).map_err(|e| identity.wrong(KEY, e))?;
        let signed = |usage| is_signed(identity, &chain, usage).is_ok();
        if signed(KeyUsage::client_auth()) && !signed(KeyUsage::server_auth()) {
            let what = "it is a worker's or an operator's, and a coordinator needs its own, as in certs/coordinator";
            return Err(identity.wrong(CERTIFICATE, what));
        }
        let provider = tls::provider();
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone());
        let verifier = verifier.build().map_err(|e| identity.wrong(CA, e))?;
        let config = ServerConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS13]);
        let config = config.map_err(|e| identity.wrong(CERTIFICATE, e))?;
        let config = config.with_client_cert_verifier(Arc::new(Later(verifier.clone())));
        let mut config = config.with_single_cert(chain, key).map_err(|e| identity.wrong(KEY, e))?;
        config.alpn_protocols = vec![tls::ALPN.to_vec()];
        config.ignore_client_order = true;
        config.enable_secret_extraction = true;
        // Each connection shows its certificate anew.
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Tls { config: Arc::new(config), verifier, token: identity.token.clone() })
    }

    /// What the certificates of a finished handshake say.
    pub fn standing(&self, certificates: &[CertificateDer<'static>]) -> Standing {
        let Some((own, between)) = certificates.split_first() else { return Standing::Stranger };
        if let Err(e) = self.verifier.verify_client_cert(own, between, UnixTime::now()) {
            return Standing::Refused(plain(&e));
        }
        let Ok(own) = webpki::EndEntityCert::try_from(own) else {
            return Standing::Refused("the certificate cannot be read".into());
        };
        let is = |role: &Role| {
            let name = ServerName::try_from(role.name());
            name.is_ok_and(|name| own.verify_is_valid_for_subject_name(&name).is_ok())
        };
        Standing::Known([Role::Worker, Role::Operator].into_iter().filter(is).collect())
    }
}

/// Whether the authority of an identity has signed its certificate for this.
fn is_signed(identity: &Identity, chain: &[CertificateDer<'_>], usage: KeyUsage) -> Result<(), IdentityError> {
    let authorities = certificates(identity, CA, &identity.ca)?;
    let anchors = authorities.iter().map(webpki::anchor_from_trusted_cert).collect::<Result<Vec<_>, _>>();
    let anchors = anchors.map_err(|e| identity.wrong(CA, e))?;
    let own = webpki::EndEntityCert::try_from(&chain[0]).map_err(|e| identity.wrong(CERTIFICATE, e))?;
    let (algorithms, between) = (webpki::ALL_VERIFICATION_ALGS, &chain[1..]);
    let signed = own.verify_for_usage(algorithms, &anchors, between, UnixTime::now(), usage, None, None);
    let why = |e| identity.wrong(CERTIFICATE, format!("{CA} beside it has not signed it ({e})"));
    signed.map(drop).map_err(why)
}

/// Finds out whether the files of an identity belong together: whether its key is the certificate's, and whether its authority has
/// signed that, as a coordinator's or as a peer's.
///
/// # Errors
/// The file that does not fit.
pub fn check_identity(identity: &Identity) -> Result<(), IdentityError> {
    let Some(pem) = &identity.certificate else { return certificates(identity, CA, &identity.ca).map(drop) };
    let chain = certificates(identity, CERTIFICATE, &pem.chain)?;
    let key = PrivateKeyDer::from_pem_slice(&pem.key).map_err(|e| identity.wrong(KEY, e))?;
    CertifiedKey::from_der(chain.clone(), key, &tls::provider()).map_err(|e| identity.wrong(KEY, e))?;
    is_signed(identity, &chain, KeyUsage::client_auth())
        .or_else(|_| is_signed(identity, &chain, KeyUsage::server_auth()))
}

/// What is wrong with a peer's certificate, and what to do.
fn plain(e: &rustls::Error) -> String {
    use CertificateError::{Expired, ExpiredContext, NotValidYet, NotValidYetContext, UnknownIssuer};
    const ANOTHER: &str = "make another with `unisono cert`, in the folder of the same CA";
    match e {
        rustls::Error::InvalidCertificate(Expired | ExpiredContext { .. }) => {
            format!("the certificate has expired: {ANOTHER}")
        }
        rustls::Error::InvalidCertificate(NotValidYet | NotValidYetContext { .. }) => {
            "the certificate is not valid yet: compare the clocks of both machines".into()
        }
        rustls::Error::InvalidCertificate(UnknownIssuer) => {
            format!("the certificate is of another CA than the coordinator's: {ANOTHER}")
        }
        other => format!("the certificate is not accepted ({other}): {ANOTHER}"),
    }
}

/// Accepts any certificate whose key the peer has, for the time of the handshake: who it is, is found out after it
/// ([`Tls::standing`]), and then the peer can be told what is wrong.
#[derive(Debug)]
struct Later(Arc<dyn ClientCertVerifier>);

impl ClientCertVerifier for Later {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[] // so that a client of another CA shows its certificate, too
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

const HOW: &str = "give the folder of one that `unisono cert` made with --identity";

/// Whether a peer may do what needs `role` (`None`: what anybody may who is let in), and if not, why.
pub fn check(
    standing: &Standing,
    token: Option<&Token>,
    metadata: &MetadataMap,
    role: Option<Role>,
) -> Result<(), Status> {
    let shown = metadata.get("authorization");
    let has_token = match (token, shown) {
        (Some(token), Some(shown)) => token.is(shown.as_encoded_bytes()),
        _ => false,
    };
    let a = |role: &Role| format!("{} {role}'s", if *role == Role::Operator { "an" } else { "a" });
    let asked = role.as_ref().map_or("a worker's or an operator's".into(), a);
    match standing {
        Standing::Anybody => Ok(()),
        Standing::Known(roles) if role.map_or(!roles.is_empty(), |role| roles.contains(&role)) => Ok(()),
        _ if has_token && role != Some(Role::Operator) => Ok(()),
        Standing::Known(roles) => {
            let roles: Vec<String> = roles.iter().map(a).collect();
            let mine =
                if roles.is_empty() { "neither a worker's nor an operator's".into() } else { roles.join(" and ") };
            Err(Status::permission_denied(format!(
                "this needs a certificate that is {asked}, and the one shown is {mine}: {HOW}"
            )))
        }
        Standing::Refused(why) => Err(Status::unauthenticated(why.clone())),
        Standing::Stranger if has_token => Err(Status::permission_denied(format!(
            "a join token lets workers in; this needs an operator's certificate: {HOW}"
        ))),
        Standing::Stranger if shown.is_some() => Err(Status::unauthenticated(match token {
            Some(_) => "the join token is not this coordinator's: copy its `token` file anew",
            None => "this coordinator takes no join tokens, because its --identity has none: show a certificate",
        })),
        Standing::Stranger => {
            let token = if token.is_some() && role != Some(Role::Operator) { " or the join token" } else { "" };
            Err(Status::unauthenticated(format!(
                "this coordinator asks for a {asked} certificate{token}, and none was shown: {HOW}"
            )))
        }
    }
}
