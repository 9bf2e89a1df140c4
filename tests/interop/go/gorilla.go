package main

import (
	"errors"
	"time"

	"github.com/gorilla/websocket"
)

// gorilla is github.com/gorilla/websocket.
type gorilla struct{ conn *websocket.Conn }

func (g *gorilla) connect(url string) (err error) {
	dialer := websocket.Dialer{Subprotocols: []string{subprotocol}, EnableCompression: true}
	g.conn, _, err = dialer.Dial(url, nil)
	return err
}

func (g *gorilla) send(text string) error {
	return g.conn.WriteMessage(websocket.TextMessage, []byte(text))
}

// sendFragments writes through the library's buffer, which makes a fragment each time that it is full (4 kB).
func (g *gorilla) sendFragments(parts []string) error {
	writer, err := g.conn.NextWriter(websocket.TextMessage)
	if err != nil {
		return err
	}
	for _, part := range parts {
		if _, err := writer.Write([]byte(part)); err != nil {
			return err
		}
	}
	return writer.Close()
}

func (g *gorilla) receive() (string, error) {
	_, payload, err := g.conn.ReadMessage()
	return string(payload), err
}

func (g *gorilla) close() (int, error) {
	farewell := websocket.FormatCloseMessage(websocket.CloseNormalClosure, "")
	if err := g.conn.WriteControl(websocket.CloseMessage, farewell, time.Now().Add(patience)); err != nil {
		return 0, err
	}
	_, _, err := g.conn.ReadMessage()
	var closed *websocket.CloseError
	if errors.As(err, &closed) {
		return closed.Code, g.conn.Close()
	}
	return 0, err
}
