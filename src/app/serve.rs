//! Serving the listeners of the roles.

use std::sync::Arc;

use axum::body::Body;

use super::collect_http::CollectEdge;
use super::edge::{closed, guarded, root};
use super::listeners::{Listeners, Listening, push_http_limits};
use super::push_http::{ConnectEdge, PushEdge};
use super::reload::{Parts, Reloader};
use super::{App, Shared};
use super::{auth_http, collect_grpc, collect_http, ops_http, page, push_http};
use crate::config::{Config, VerifyBy};
use crate::role::VerifyService;
use crate::role::connect::Connect;
use crate::role::push::Push;
use crate::secret::page_code;
use crate::transport::http::{AnswerBody, Answers, HttpLimits, UpgradeHandler, serve};
use crate::transport::tls::ServerTls;
use crate::wire::frame::ReconnectHint;

impl App {
    pub(super) fn serve_ops(&mut self, shared: &Shared, listeners: &mut Listeners) {
        let ops = ops_http::OpsEdge {
            health: self.health.clone(),
            metrics: shared.metrics.clone(),
            membership: Arc::clone(&shared.membership),
            urls: shared.urls.clone(),
        };
        if let Some(listening) = listeners.ops.take() {
            let loopback = listening.at.ip().is_loopback();
            self.serve(listening, ops_http::routes(Arc::new(ops), loopback), HttpLimits::default());
        }
    }

    pub(super) fn serve_all(
        &mut self,
        config: &Config,
        shared: &Shared,
        verify: Option<VerifyService>,
        collect: Option<Arc<CollectEdge>>,
        listeners: Listeners,
    ) {
        let parts = Parts {
            live: shared.live.clone(),
            tls: shared.tls.clone(),
            auth: shared.own_auth.clone(),
            collect: collect.clone(),
            membership: Arc::clone(&shared.membership),
            clock: shared.clock.clone(),
        };
        self.reloader = Some(Reloader::new(config, parts));
        let development = shared.own_auth.clone().zip(collect.clone());
        // Only if no key is configured: otherwise there are real users.
        let development = development.filter(|_| self.keys.self_made && config.verify_by == VerifyBy::Key);
        let code = page_code(config.peer_secret_texts().first().unwrap_or(&""));
        let development =
            development.map(|(auth, collect)| Arc::new(page::Development { auth, collect, code }));
        for (push, listening) in self.pushes.clone().into_iter().zip(listeners.push) {
            let Some(verify) = &verify else { break };
            let connect = connect_edge(config, shared, verify, Some(push.clone()));
            let edge = PushEdge { connect, push: push.clone() };
            // Whoever reaches the port could get anybody's token, so only this machine may reach
            // it.
            let loopback = listening.at.ip().is_loopback();
            let development = development.clone().filter(|_| config.development && loopback);
            let page = page::routes(page::Page { development, push, loopback });
            let edge = Arc::new(edge);
            let routes = closed(push_http::push_routes(Arc::clone(&edge)).merge(page));
            self.serve_sockets(listening, routes, edge, shared.tls.push());
        }
        let plain = HttpLimits::default();
        if let (Some(listening), Some(edge)) = (listeners.collect, collect) {
            let routes = collect_grpc::with_grpc(collect_http::routes(Arc::clone(&edge)), Arc::clone(&edge));
            self.serve_over(listening, collect_http::front(edge, routes), plain, shared.tls.collect());
        }
        if let (Some(listening), Some(auth)) = (listeners.auth, &shared.own_auth) {
            let edge = auth_http::AuthEdge {
                auth: auth.clone(),
                times: shared.auth_times.clone(),
                admin_key: shared.live.admin_key.clone(),
                strangers: shared.strangers.clone(),
                refusals: shared.refusals.clone(),
                budgets: shared.budgets.clone(),
            };
            let routes = auth_http::routes(Arc::new(edge)).merge(root("ringpush auth: POST /v1/verify\n"));
            self.serve(listening, routes, plain);
        }
        if let (Some(listening), Some(verify)) = (listeners.dispatch, &verify) {
            let edge = connect_edge(config, shared, verify, None);
            let routes = push_http::dispatch_routes(Arc::new(edge));
            self.serve(listening, routes.merge(root("ringpush dispatch: POST /v1/connect\n")), plain);
        }
    }

    pub(super) fn serve_peers<B: AnswerBody>(
        &mut self,
        listening: Listening,
        routes: impl Answers<B>,
        tls: Option<ServerTls>,
    ) {
        let limits = HttpLimits::default();
        self.servers.spawn(serve(listening.listener, routes, None, tls, limits, self.stop.clone()));
    }

    pub(super) fn serve(&mut self, listening: Listening, service: impl Answers<Body>, limits: HttpLimits) {
        self.serve_over(listening, service, limits, None);
    }

    fn serve_over(
        &mut self,
        listening: Listening,
        service: impl Answers<Body>,
        limits: HttpLimits,
        tls: Option<ServerTls>,
    ) {
        let service = guarded(service);
        self.servers.spawn(serve(listening.listener, service, None, tls, limits, self.stop.clone()));
    }

    pub(super) fn serve_sockets(
        &mut self,
        listening: Listening,
        service: impl Answers<Body>,
        edge: Arc<dyn UpgradeHandler<Body>>,
        tls: Option<ServerTls>,
    ) {
        let (service, limits) = (guarded(service), push_http_limits());
        let serving = serve(listening.listener, service, Some(edge), tls, limits, self.stop.clone());
        self.servers.spawn(serving);
    }
}

pub(super) fn connect_edge(
    config: &Config,
    shared: &Shared,
    verify: &VerifyService,
    push: Option<Push>,
) -> ConnectEdge {
    ConnectEdge {
        connect: Connect::new(
            verify.clone(),
            shared.membership.views(),
            shared.urls.clone(),
            shared.live.tickets.clone(),
            shared.reach.clone(),
            shared.clock.clone(),
        ),
        origins: shared.live.origins.clone(),
        strangers: shared.strangers.clone(),
        hint: ReconnectHint { min_ms: 0, max_ms: config.push.reconnect_jitter_ms },
        refusals: shared.refusals.clone(),
        budgets: shared.budgets.clone(),
        push,
    }
}
