// A small server around Centrifuge, the engine of Centrifugo, as a peer to measure against: JSON protocol over WebSocket, a
// token verified in the connect frame, one personal channel per user subscribed on connect, publishes over HTTP.
//
//	POST /api/publish  {"channel":"user-1","data":…}
//	POST /api/batch    [{"channel":"user-1","data":…}, …]
package main

import (
	"context"
	"encoding/json"
	"flag"
	"log"
	"net"
	"net/http"
	"time"

	"github.com/centrifugal/centrifuge"
	"github.com/golang-jwt/jwt/v5"
)

type publication struct {
	Channel string          `json:"channel"`
	Data    json.RawMessage `json:"data"`
}

func main() {
	listen := flag.String("listen", "127.0.0.1:0", "where to listen")
	key := flag.String("key", "", "HS256 key of the tokens")
	history := flag.Int("history", 0, "messages kept per channel; 0: none")
	redis := flag.String("redis", "", "host:port of a Redis that joins several of these and keeps the history; empty: alone, in memory")
	small := flag.Bool("small", false, "1 KiB buffers and a pool of write buffers, instead of the defaults")
	flag.Parse()

	node, err := centrifuge.New(centrifuge.Config{LogLevel: centrifuge.LogLevelError, LogHandler: func(entry centrifuge.LogEntry) {
		log.Println(entry.Message, entry.Fields)
	}})
	if err != nil {
		log.Fatal(err)
	}
	parser := jwt.NewParser(jwt.WithValidMethods([]string{"HS256"}), jwt.WithExpirationRequired())
	node.OnConnecting(func(_ context.Context, event centrifuge.ConnectEvent) (centrifuge.ConnectReply, error) {
		var claims jwt.RegisteredClaims
		_, err := parser.ParseWithClaims(event.Token, &claims, func(*jwt.Token) (any, error) { return []byte(*key), nil })
		if err != nil || claims.Subject == "" {
			return centrifuge.ConnectReply{}, centrifuge.DisconnectInvalidToken
		}
		options := centrifuge.SubscribeOptions{EnableRecovery: *history > 0}
		return centrifuge.ConnectReply{
			Credentials:   &centrifuge.Credentials{UserID: claims.Subject},
			Subscriptions: map[string]centrifuge.SubscribeOptions{claims.Subject: options},
		}, nil
	})
	node.OnConnect(func(*centrifuge.Client) {})
	if *redis != "" {
		shard, err := centrifuge.NewRedisShard(node, centrifuge.RedisShardConfig{Address: *redis})
		if err != nil {
			log.Fatal(err)
		}
		broker, err := centrifuge.NewRedisBroker(node, centrifuge.RedisBrokerConfig{Shards: []*centrifuge.RedisShard{shard}})
		if err != nil {
			log.Fatal(err)
		}
		node.SetBroker(broker)
	}
	if err := node.Run(); err != nil {
		log.Fatal(err)
	}

	var options []centrifuge.PublishOption
	if *history > 0 {
		options = append(options, centrifuge.WithHistory(*history, time.Hour))
	}
	publish := func(one publication) error {
		_, err := node.Publish(one.Channel, one.Data, options...)
		return err
	}
	config := centrifuge.WebsocketConfig{CheckOrigin: func(*http.Request) bool { return true }}
	if *small {
		config.ReadBufferSize, config.WriteBufferSize, config.UseWriteBufferPool = 1024, 1024, true
	}
	http.Handle("/connection", centrifuge.NewWebsocketHandler(node, config))
	http.HandleFunc("POST /api/publish", func(w http.ResponseWriter, r *http.Request) {
		var one publication
		if err := json.NewDecoder(r.Body).Decode(&one); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		answer(w, publish(one))
	})
	http.HandleFunc("POST /api/batch", func(w http.ResponseWriter, r *http.Request) {
		var all []publication
		if err := json.NewDecoder(r.Body).Decode(&all); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		for _, one := range all {
			if err := publish(one); err != nil {
				answer(w, err)
				return
			}
		}
		answer(w, nil)
	})
	listener, err := net.Listen("tcp", *listen)
	if err != nil {
		log.Fatal(err)
	}
	log.Fatal(http.Serve(listener, nil))
}

func answer(w http.ResponseWriter, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	body := []byte("{}")
	w.Header().Set("Content-Type", "application/json")
	w.Write(body)
}
